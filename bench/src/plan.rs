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
/// What a rule may take more where there are a hundred times as many.
const NEAR_LINEAR: f64 = 1.5;

pub(crate) fn measure(effort: Effort) -> Measured {
    let mut figures = Vec::new();
    let mut each = Vec::new();
    let sizes: &[usize] = if effort == Effort::Full {
        &[10, 100, 1_000, 10_000, 100_000]
    } else {
        &[10, 100, 1_000]
    };
    for rules in sizes {
        let text = policy(*rules);
        compile(&text)?;
        // Milliseconds.
        let ours = |_: &mut ()| nanoseconds(1_000_000, || black_box(compile(black_box(&text))).map(drop));
        let toml = |_: &mut ()| nanoseconds(1_000_000, || read_toml(black_box(&text)));
        let turns = effort.of(if *rules > 10_000 { 6 } else { 25 }, 1);
        let [ours, toml] = rounds(turns, &mut (), [&ours, &toml])?;
        let figure = Figure::new(format!("{rules} rules"), "ms", ours.least());
        let figure = figure.beside("their TOML read, and no more", toml.least());
        figures.push(match rules {
            10_000 => figure.aim(Aim::Ours(AIM)),
            _ => figure,
        });
        each.push((*rules, 1e3 * ours.least() / *rules as f64));
    }
    if let [.., (_, few), _, (rules, many)] = each.as_slice() {
        let figure = Figure::new(format!("a rule of {rules}"), "µs", *many);
        figures.push(
            figure
                .beside("a rule of a hundredth of them", *few)
                .aim(Aim::Ratio(NEAR_LINEAR)),
        );
    }
    Ok(figures)
}

fn read_toml(text: &str) -> Result<(), toml::de::Error> {
    black_box(toml::de::DeTable::parse(text)?);
    Ok(())
}

fn compile(text: &str) -> Result<Plan, String> {
    let policy = Policy::parse("bench.toml", text).map_err(|rejected| format!("{:?}", rejected.diagnostics))?;
    let map = policy.decision_map(None).map_err(|error| error.to_string())?;
    Plan::compile(&map).map_err(|error| error.to_string())
}

/// So many rules as a policy that was learned has them, one for the reads and one for the writes of each MSR.
pub(crate) fn policy(rules: usize) -> String {
    let mut text = String::from("version = 1\nname = \"bench\"\ndefault = \"deny\"\n");
    for rule in 0..rules {
        // No two neighbours are of one mind, and all lie where 16 ranges reach.
        let msr = 0x4000_0000 + rule / 2 * if rules > 50_000 { 1 } else { 3 };
        let says = match rule % 8 {
            0 | 4 => "read  = \"allow\"".to_owned(),
            1 => "write = \"allow\"".to_owned(),
            2 => format!("read  = {{ value = \"{rule:#x}\" }}"),
            3 => "write = \"ignore\"".to_owned(),
            5 => "write = \"deny\"".to_owned(),
            6 => "read  = { shadow = 0 }".to_owned(),
            _ => "write = \"shadow\"".to_owned(),
        };
        let _ = write!(
            text,
            "\n[[rule]]\nmsr   = \"{msr:#x}\"\n{says}\nwhy   = \"rule {rule} of many\"\n"
        );
    }
    text
}
