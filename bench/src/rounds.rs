//! Measuring several measurements in turns.

use std::time::Instant;

use nix::time::{ClockId, clock_gettime};

/// What one thing cost in each round.
pub(crate) struct Costs(pub(crate) Vec<f64>);

/// Does the work that is measured on what all measurements of a round share, and gives the cost.
pub(crate) type Measurement<'a, T> = &'a dyn Fn(&mut T) -> Result<f64, String>;

/// Measures each of `measurements` once a round, all with the same `what`.
///
/// The first of a round is another each time, so that none always follows the same one. A round before the first warms
/// caches and is not counted.
pub(crate) fn rounds<T: ?Sized, const N: usize>(
    count: usize,
    what: &mut T,
    measurements: [Measurement<'_, T>; N],
) -> Result<[Costs; N], String> {
    let mut costs: [Costs; N] = std::array::from_fn(|_| Costs(Vec::with_capacity(count)));
    for round in 0..=count {
        for place in 0..N {
            let which = (round + place) % N;
            if let (Some(thing), Some(costs)) = (measurements.get(which), costs.get_mut(which)) {
                let cost = thing(what)?;
                if round > 0 {
                    costs.0.push(cost);
                }
            }
        }
    }
    Ok(costs)
}

/// Nanoseconds that `work` takes, divided by `count`.
///
/// The time is this thread's processor time, to which other programs on the machine do not add.
pub(crate) fn nanoseconds<E: ToString>(count: usize, work: impl FnOnce() -> Result<(), E>) -> Result<f64, String> {
    let start = processor_time()?;
    work().map_err(|error| error.to_string())?;
    Ok((processor_time()? - start) / count as f64)
}

/// Like [`nanoseconds`], but by wall-clock time, for work that waits.
pub(crate) fn waited<E: ToString>(count: usize, work: impl FnOnce() -> Result<(), E>) -> Result<f64, String> {
    let start = Instant::now();
    work().map_err(|error| error.to_string())?;
    Ok(start.elapsed().as_nanos() as f64 / count as f64)
}

/// This thread's processor time, in nanoseconds.
fn processor_time() -> Result<f64, String> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(|error| error.to_string())?;
    Ok(now.tv_sec() as f64 * 1e9 + now.tv_nsec() as f64)
}

impl Costs {
    /// The least: what work costs that nothing disturbed. For work that always takes the same steps.
    pub(crate) fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The middle one: for work that waits for others, and so has no cost of its own.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}
