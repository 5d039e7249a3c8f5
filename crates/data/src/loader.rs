//! Batches made ahead by worker threads, in an order that is a pure function of (seed, step).
//!
//! Workers claim one sample at a time; whoever finishes the last sample of a batch joins it. No more than `prefetch`
//! batches are under way or waiting. A failing sample or a panic becomes an error of the iterator, which then ends.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use candle_core::Device;
use segdistill_ops::rng::Stream;

use crate::batch::{Batch, collate};
use crate::error::{DataError, Result};
use crate::sample::{Dataset, Sample};
use crate::transform::{SampleKey, TrainTransform};

/// How batches are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Samples a batch.
    pub batch_size: usize,
    /// Threads that make samples; with 0 the caller's thread makes each batch when asked for it.
    pub workers: usize,
    /// Most batches under way or waiting, at least 1.
    pub prefetch: usize,
    /// Seed of order and transforms.
    pub seed: u64,
}

/// Makes batches of a data set, without end.
///
/// Each epoch is a permutation of the samples drawn from the stream `order` at (seed, epoch); samples that do not fill
/// a last batch sit that epoch out. Batch k depends on (seed, k) only: not on workers, prefetch or the step started at.
pub struct Loader {
    plan: Arc<Plan>,
    workers: usize,
    prefetch: usize,
}

struct Plan {
    dataset: Arc<dyn Dataset>,
    transform: Option<TrainTransform>,
    batch_size: usize,
    seed: u64,
}

impl Loader {
    /// A loader over `dataset`; without a transform samples pass unchanged and must share one size.
    ///
    /// # Errors
    /// `Config` for a batch size or prefetch of 0, fewer samples than a batch takes, or a transform out of range.
    pub fn new(dataset: Arc<dyn Dataset>, transform: Option<TrainTransform>, cfg: LoaderConfig) -> Result<Self> {
        if cfg.batch_size == 0 || cfg.prefetch == 0 {
            let what = format!("batch_size = {}, prefetch = {}", cfg.batch_size, cfg.prefetch);
            return Err(DataError::config(what, "both are at least 1"));
        }
        if dataset.len() < cfg.batch_size {
            let what = format!(
                "{} {} has {} samples, a batch takes {}",
                dataset.id(),
                dataset.split(),
                dataset.len(),
                cfg.batch_size
            );
            return Err(DataError::config(what, "lower the batch size or bring more samples"));
        }
        if let Some(transform) = &transform {
            transform.check()?;
        }
        let plan = Plan { dataset, transform, batch_size: cfg.batch_size, seed: cfg.seed };
        Ok(Self { plan: Arc::new(plan), workers: cfg.workers, prefetch: cfg.prefetch })
    }

    /// Whole batches an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.plan.steps_per_epoch()
    }

    /// The batches from `step` on, without end. Dropping the iterator ends its threads.
    pub fn iter_from(&self, step: u64) -> BatchIter {
        let state = State {
            consumed: step,
            claimed: step,
            claimed_samples: 0,
            parts: BTreeMap::new(),
            order: None,
            stop: false,
        };
        let shared = Arc::new(Shared {
            plan: Arc::clone(&self.plan),
            prefetch: self.prefetch as u64,
            state: Mutex::new(state),
            room: Condvar::new(),
            ready: Condvar::new(),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("loader-{i}")).spawn(move || shared.work())
        };
        let mut workers = Vec::new();
        let mut refused = None;
        for i in 0..self.workers {
            match spawn(i) {
                Ok(worker) => workers.push(worker),
                Err(e) => {
                    refused = Some(DataError::Io(e));
                    break;
                }
            }
        }
        BatchIter { shared, inline: self.workers == 0, workers, refused, next: step, ended: false }
    }
}

impl Plan {
    fn steps_per_epoch(&self) -> usize {
        self.dataset.len() / self.batch_size
    }

    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.dataset.len()).collect();
        Stream::new(self.seed, "order", &[epoch]).shuffle(&mut order);
        order
    }

    /// One sample, with a panic turned into an error and either told by step and name.
    fn make(&self, step: u64, epoch: u64, index: usize) -> Result<Sample> {
        let made = catch_unwind(AssertUnwindSafe(|| {
            let sample = self.dataset.sample(index)?;
            let key = SampleKey { seed: self.seed, epoch, index: index as u64 };
            match &self.transform {
                Some(transform) => transform.apply(&sample, key),
                None => Ok(sample),
            }
        }));
        let why = match made {
            Ok(Ok(sample)) => return Ok(sample),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("panicked: {}", panic_message(panic.as_ref())),
        };
        let name = catch_unwind(AssertUnwindSafe(|| self.dataset.sample_name(index)));
        Err(DataError::Sample { step, name: name.unwrap_or_else(|_| format!("#{index}")), why })
    }

    /// A whole batch; of several failing samples the first in the batch speaks.
    fn join(&self, samples: Vec<Option<Result<Sample>>>) -> Result<Batch> {
        let samples: Vec<Sample> = samples
            .into_iter()
            .map(|s| s.expect("every sample of a finished batch was made"))
            .collect::<Result<_>>()?;
        collate(&samples, &Device::Cpu)
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// A batch on its way.
enum Part {
    Samples { made: Vec<Option<Result<Sample>>>, missing: usize },
    Joining,
    Done(Result<Batch>),
}

struct State {
    /// Next step the consumer takes.
    consumed: u64,
    /// Step of the next sample to claim, and its place in the batch.
    claimed: u64,
    claimed_samples: usize,
    parts: BTreeMap<u64, Part>,
    order: Option<(u64, Vec<usize>)>,
    stop: bool,
}

struct Shared {
    plan: Arc<Plan>,
    prefetch: u64,
    state: Mutex<State>,
    /// Signalled when a worker may claim again, or should stop.
    room: Condvar,
    /// Signalled when a batch is done.
    ready: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some((step, place, epoch, index)) = self.claim() {
            let sample = self.plan.make(step, epoch, index);
            let Some(samples) = self.put(step, place, sample) else { continue };
            // Joining copies megabytes, so it is done outside the lock.
            let joined = catch_unwind(AssertUnwindSafe(|| self.plan.join(samples)));
            let batch = joined.unwrap_or_else(|panic| {
                let why = format!("panicked: {}", panic_message(panic.as_ref()));
                Err(DataError::Sample { step, name: "the whole batch".into(), why })
            });
            self.lock().parts.insert(step, Part::Done(batch));
            self.ready.notify_all();
        }
    }

    /// Step, place in the batch, epoch and index of the next sample; waits for room, `None` when the iterator is gone.
    fn claim(&self) -> Option<(u64, usize, u64, usize)> {
        let mut state = self.lock();
        while !state.stop && state.claimed >= state.consumed.saturating_add(self.prefetch) {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stop {
            return None;
        }
        let (step, place) = (state.claimed, state.claimed_samples);
        let per_epoch = self.plan.steps_per_epoch() as u64;
        let (epoch, first) = (step / per_epoch, (step % per_epoch) as usize * self.plan.batch_size);
        if state.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            state.order = Some((epoch, self.plan.order(epoch)));
        }
        let index = state.order.as_ref().map(|(_, order)| order[first + place]).expect("the order was just made");
        if place == 0 {
            let made = (0..self.plan.batch_size).map(|_| None).collect();
            state.parts.insert(step, Part::Samples { made, missing: self.plan.batch_size });
        }
        state.claimed_samples += 1;
        if state.claimed_samples == self.plan.batch_size {
            state.claimed += 1;
            state.claimed_samples = 0;
        }
        Some((step, place, epoch, index))
    }

    /// Files a sample; hands the batch's samples over when it was the last one missing.
    fn put(&self, step: u64, place: usize, sample: Result<Sample>) -> Option<Vec<Option<Result<Sample>>>> {
        let mut state = self.lock();
        let part = state.parts.get_mut(&step)?;
        let Part::Samples { made, missing } = part else { return None };
        made[place] = Some(sample);
        *missing -= 1;
        if *missing > 0 {
            return None;
        }
        match std::mem::replace(part, Part::Joining) {
            Part::Samples { made, .. } => Some(made),
            Part::Joining | Part::Done(_) => None,
        }
    }

    /// Waits for the batch of `step`.
    fn take(&self, step: u64) -> Result<Batch> {
        let mut state = self.lock();
        loop {
            if matches!(state.parts.get(&step), Some(Part::Done(_))) {
                let Some(Part::Done(batch)) = state.parts.remove(&step) else { unreachable!("it was just seen") };
                state.consumed = step + 1;
                drop(state);
                self.room.notify_all();
                return batch;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn make_inline(&self, step: u64) -> Result<Batch> {
        let per_epoch = self.plan.steps_per_epoch() as u64;
        let (epoch, first) = (step / per_epoch, (step % per_epoch) as usize * self.plan.batch_size);
        let order = self.plan.order(epoch);
        let picked = &order[first..first + self.plan.batch_size];
        self.plan.join(picked.iter().map(|index| Some(self.plan.make(step, epoch, *index))).collect())
    }
}

/// Batches in order. After an error the iterator is at its end.
pub struct BatchIter {
    shared: Arc<Shared>,
    inline: bool,
    workers: Vec<JoinHandle<()>>,
    refused: Option<DataError>,
    next: u64,
    ended: bool,
}

impl Iterator for BatchIter {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Result<Batch>> {
        if self.ended {
            return None;
        }
        let batch = match self.refused.take() {
            Some(error) => Err(error),
            None if self.inline => self.shared.make_inline(self.next),
            None => self.shared.take(self.next),
        };
        self.next += 1;
        self.ended = batch.is_err();
        Some(batch)
    }
}

impl Drop for BatchIter {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.room.notify_all();
        for worker in self.workers.drain(..) {
            // A worker turns every panic into a result; there is nothing left to report here.
            let _ = worker.join();
        }
    }
}
