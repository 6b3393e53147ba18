//! `plan`: from the text of a policy to its plan.

use std::fmt::Write;
use std::hint::black_box;

use msrgate_plan::Plan;
use msrgate_policy::Policy;

use crate::figure::{Aim, Figure};
use crate::rounds::{nanoseconds, rounds};
use crate::{Effort, Measured};

/// Milliseconds that 10,000 rules may take.
const AIM: f64 = 20.0;
/// What ten times as many rules may take more.
const NEAR_LINEAR: f64 = 14.0;

pub(crate) fn measure(effort: Effort) -> Measured {
    let mut figures = Vec::new();
    let mut tenth = None;
    let sizes: &[usize] = if effort == Effort::Full {
        &[10, 100, 1_000, 10_000, 100_000]
    } else {
        &[10, 100, 1_000]
    };
    for rules in sizes {
        let text = policy(*rules);
        compile(&text)?;
        let ours = |_: &mut ()| nanoseconds(1_000_000, || black_box(compile(black_box(&text))).map(drop));
        let [ours] = rounds(effort.of(if *rules > 10_000 { 8 } else { 25 }, 1), &mut (), [&ours])?;
        let ours = ours.least();
        let figure = Figure::new(format!("{rules} rules"), "ms", ours);
        let figure = match tenth {
            Some(tenth) => figure.beside("a tenth of the rules", tenth),
            None => figure,
        };
        figures.push(match rules {
            10_000 => figure.aim(Aim::Ours(AIM)),
            100_000 => figure.aim(Aim::Ratio(NEAR_LINEAR)),
            _ => figure,
        });
        tenth = Some(ours);
    }
    Ok(figures)
}

fn compile(text: &str) -> Result<Plan, String> {
    let policy = Policy::parse("bench.toml", text).map_err(|rejected| format!("{:?}", rejected.diagnostics))?;
    let map = policy.decision_map(None).map_err(|error| error.to_string())?;
    Plan::compile(&map).map_err(|error| error.to_string())
}

/// So many rules of one MSR each, as a policy that was learned has them; up to 12288 of them for one range.
pub(crate) fn policy(rules: usize) -> String {
    let mut text = String::from("version = 1\nname = \"bench\"\ndefault = \"deny\"\n");
    for rule in 0..rules {
        // No two neighbours are of one mind. 16 ranges reach as far as the most that are asked for here.
        let msr = 0x4000_0000 + rule * if rules > 50_000 { 1 } else { 3 };
        let says = match rule % 4 {
            0 => "read  = \"allow\"\nwrite = \"allow\"".to_owned(),
            1 => format!("read  = {{ value = \"{rule:#x}\" }}\nwrite = \"ignore\""),
            2 => "read  = \"allow\"\nwrite = \"deny\"".to_owned(),
            _ => "read  = { shadow = 0 }\nwrite = \"shadow\"".to_owned(),
        };
        let _ = write!(
            text,
            "\n[[rule]]\nmsr   = \"{msr:#x}\"\n{says}\nwhy   = \"rule {rule} of many\"\n"
        );
    }
    text
}
