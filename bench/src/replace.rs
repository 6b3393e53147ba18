//! `replace`: a filter replaced under readers, beside `arc-swap` and a lock.

use std::convert::Infallible;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;
use msrgate_core::{Filter, FilterRange, FlatFilter, Msr, Op, Ops, Verdict};
use msrgate_engine::{Intercepts, Vcpu, Vm};

use crate::figure::{Aim, Figure};
use crate::rounds::{nanoseconds, rounds};
use crate::{Effort, Measured};

/// How long a writer rests between two replacements.
const REST: Duration = Duration::from_micros(100);

pub(crate) fn measure(effort: Effort) -> Measured {
    let [a, b] = [0, u64::MAX].map(|bits| filter(bits).map_err(|error| error.to_string()));
    let (a, b) = (a?, b?);

    let vm = Arc::new(Vm::new());
    let flat: [Arc<FlatFilter>; 2] = [a.clone().into(), b.clone().into()];
    let plain = [&a, &b].map(|filter| Arc::new(filter.clone()));
    let [first, _] = &plain;
    let swap = ArcSwap::new(Arc::clone(first));
    let lock = RwLock::new(Arc::clone(first));
    vm.set_filter(a.clone());
    let ours = Store {
        filters: &flat,
        replace: &|filter| vm.set_filter(Arc::clone(filter)),
        reader: || {
            let mut vcpu = Vcpu::new(Arc::clone(&vm), Intercepts::all());
            move |msr, op| vcpu.verdict(msr, op)
        },
    };
    let swapped = Store {
        filters: &plain,
        replace: &|filter| swap.store(Arc::clone(filter)),
        reader: || |msr, op| swap.load().verdict(msr, op),
    };
    let locked = Store {
        filters: &plain,
        replace: &|filter| {
            if let Ok(mut held) = lock.write() {
                *held = Arc::clone(filter);
            }
        },
        reader: || |msr, op| lock.read().map_or(Verdict::Deny, |filter| filter.verdict(msr, op)),
    };

    let times = effort.of(2_000, 20);
    let mut figures = Vec::new();
    let [mine, arc_swap, rw_lock, flattening] = rounds(
        effort.of(20, 1),
        &mut (),
        [
            &|()| ours.replacement(times),
            &|()| swapped.replacement(times),
            &|()| locked.replacement(times),
            &|()| nanoseconds(times, || (0..times).try_for_each(|_| flatten(&a))),
        ],
    )?;
    let figure = || Figure::new("a replacement", "ns", mine.least());
    figures.push(figure().beside("arc-swap", arc_swap.least()));
    figures.push(figure().beside("RwLock", rw_lock.least()));
    figures.push(Figure::new(
        "a filter made ready for it, once for all VMs",
        "ns",
        flattening.least(),
    ));

    let asked = effort.of(2_000_000, 2_000);
    for readers in [1, 2, 4] {
        let [busy, calm, arc_swap, rw_lock] = rounds(
            effort.of(5, 1),
            &mut (),
            [
                &|()| ours.verdict(readers, asked, Replacing::Often),
                &|()| ours.verdict(readers, asked, Replacing::Never),
                &|()| swapped.verdict(readers, asked, Replacing::Often),
                &|()| locked.verdict(readers, asked, Replacing::Often),
            ],
        )?;
        let what = format!(
            "a verdict, {readers} thread{}, replacing",
            if readers == 1 { "" } else { "s" }
        );
        let figure = || Figure::new(what.clone(), "ns", busy.least());
        figures.push(figure().beside("not replacing", calm.least()).aim(Aim::Ratio(1.05)));
        figures.push(figure().beside("arc-swap, replacing", arc_swap.least()));
        figures.push(figure().beside("RwLock, replacing", rw_lock.least()));
    }
    Ok(figures)
}

fn filter(bits: u64) -> Result<Filter, msrgate_core::FilterError> {
    let ranges = (0..4).map(|slot| FilterRange::new(0x1000_0000 * slot, 0x1000, Ops::BOTH, [bits; 64]));
    Filter::new(Verdict::Deny, ranges.collect::<Result<Vec<_>, _>>()?)
}

fn flatten(filter: &Filter) -> Result<(), Infallible> {
    black_box(FlatFilter::new(filter.clone()));
    Ok(())
}

/// Something that holds a filter.
struct Store<'a, F, R> {
    filters: &'a [Arc<F>; 2],
    replace: &'a (dyn Fn(&Arc<F>) + Sync),
    /// Makes what a thread asks.
    reader: R,
}

/// What happens to the filter while it is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Replacing {
    Never,
    /// Two take turns.
    Often,
}

impl<F, R, V> Store<'_, F, R>
where
    F: Send + Sync,
    R: Fn() -> V + Sync,
    V: FnMut(Msr, Op) -> Verdict,
{
    /// Nanoseconds of a replacement that nobody watches.
    fn replacement(&self, times: usize) -> Result<f64, String> {
        nanoseconds(times, || {
            self.filters.iter().cycle().take(times).for_each(self.replace);
            Ok::<(), String>(())
        })
    }

    /// Nanoseconds of processor time that a verdict takes on so many threads.
    fn verdict(&self, readers: usize, asked: usize, replacing: Replacing) -> Result<f64, String> {
        let over = &AtomicBool::new(false);
        thread::scope(|scope| {
            if replacing == Replacing::Often {
                scope.spawn(move || {
                    let turns = self.filters.iter().cycle();
                    for filter in turns.take_while(|_| !over.load(Ordering::Relaxed)) {
                        (self.replace)(filter);
                        thread::sleep(REST);
                    }
                });
            }
            let threads: Vec<_> = (0..readers).map(|_| scope.spawn(|| self.asks(asked))).collect();
            let times = threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| "a reader panicked")?);
            let sum: Result<f64, String> = times.sum();
            over.store(true, Ordering::Relaxed);
            Ok(sum? / readers as f64)
        })
    }

    /// Nanoseconds that a verdict takes on this thread.
    fn asks(&self, asked: usize) -> Result<f64, String> {
        let mut verdict = (self.reader)();
        nanoseconds(asked, || {
            let mut allowed = 0u32;
            for place in 0..asked {
                let msr = Msr(black_box(0x1000_0000 * (place as u32 % 5) + (place as u32 & 0xfff)));
                allowed += u32::from(verdict(msr, Op::Read) == Verdict::Allow);
            }
            black_box(allowed);
            Ok::<(), String>(())
        })
    }
}
