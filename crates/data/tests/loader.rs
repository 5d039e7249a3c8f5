//! The loader: order, resume, errors and panics of workers, slow ends, and dropping it in the middle.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use segdistill_data::transform::TrainTransform;
use segdistill_data::{
    Batch, ClassTable, DataError, Dataset, DecodedCache, LabelMap, Loader, LoaderConfig, Manifest, Result, RgbImage,
    Sample, Split,
};

/// Samples whose first pixel is their index, with what a test asks for on the way.
struct Numbers {
    len: usize,
    classes: ClassTable,
    made: AtomicUsize,
    delay: Box<dyn Fn(usize) -> Duration + Send + Sync>,
    panics_at: Option<usize>,
    fails_at: Option<usize>,
}

impl Numbers {
    fn new(len: usize) -> Self {
        let classes = Manifest::named("camvid").unwrap().classes;
        let delay = Box::new(|_| Duration::ZERO);
        Self { len, classes, made: AtomicUsize::new(0), delay, panics_at: None, fails_at: None }
    }
}

impl Dataset for Numbers {
    fn len(&self) -> usize {
        self.len
    }
    fn sample(&self, index: usize) -> Result<Sample> {
        self.made.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep((self.delay)(index));
        assert_ne!(Some(index), self.panics_at, "the drawer broke");
        if Some(index) == self.fails_at {
            return Err(DataError::config("this sample is bad", "take another"));
        }
        let image = RgbImage { height: 6, width: 6, rgb: (0..108).map(|i| (index * 3 + i) as u8).collect() };
        Ok(Sample { image, labels: LabelMap::filled(6, 6, (index % 11) as u8), name: self.sample_name(index) })
    }
    fn classes(&self) -> &ClassTable {
        &self.classes
    }
    fn id(&self) -> &str {
        "numbers"
    }
    fn split(&self) -> Split {
        Split::Train
    }
    fn sample_name(&self, index: usize) -> String {
        format!("n{index}")
    }
}

fn config(workers: usize, prefetch: usize) -> LoaderConfig {
    LoaderConfig { batch_size: 4, workers, prefetch, seed: 5 }
}

fn transform() -> TrainTransform {
    TrainTransform { scale: [0.5, 2.0], flip: 0.5, brightness: 0.3, ..TrainTransform::plain([5, 5]) }
}

type Values = (Vec<String>, Vec<f32>, Vec<u8>);

fn values(batch: Batch) -> Values {
    let images = batch.images_nchw.flatten_all().unwrap().to_vec1().unwrap();
    (batch.names, images, batch.labels_nhw.flatten_all().unwrap().to_vec1().unwrap())
}

fn take(data: Numbers, cfg: LoaderConfig, from: u64, n: usize) -> Vec<Values> {
    let loader = Loader::new(Arc::new(data), Some(transform()), cfg).unwrap();
    loader.iter_from(from).take(n).map(|b| values(b.unwrap())).collect()
}

#[test]
fn batches_do_not_depend_on_workers_prefetch_or_start() {
    let whole = take(Numbers::new(18), config(0, 1), 0, 11);
    // Samples that take unlike times finish out of order.
    let uneven = || {
        let delay = |i: usize| Duration::from_micros((i as u64 * 7919) % 900);
        Numbers { delay: Box::new(delay), ..Numbers::new(18) }
    };
    for (workers, prefetch) in [(1, 1), (2, 3), (5, 2), (3, 8)] {
        assert_eq!(take(uneven(), config(workers, prefetch), 0, 11), whole, "{workers} workers, {prefetch} ahead");
    }
    for start in [1, 4, 7] {
        assert_eq!(take(uneven(), config(2, 2), start, 11 - start as usize), whole[start as usize..], "from {start}");
        assert_eq!(take(uneven(), config(0, 2), start, 11 - start as usize), whole[start as usize..], "from {start}");
    }
    assert_ne!(take(Numbers::new(18), LoaderConfig { seed: 6, ..config(0, 1) }, 0, 11), whole);
}

#[test]
fn an_epoch_takes_each_sample_at_most_once_and_drops_the_rest() {
    let loader = Loader::new(Arc::new(Numbers::new(18)), None, config(2, 2)).unwrap();
    assert_eq!(loader.steps_per_epoch(), 4);
    let names: Vec<String> = loader.iter_from(0).take(8).flat_map(|b| b.unwrap().names).collect();
    let (first, second) = names.split_at(16);
    for epoch in [first, second] {
        assert_eq!(epoch.iter().collect::<std::collections::BTreeSet<_>>().len(), 16, "{epoch:?}");
    }
    assert_ne!(first, second, "each epoch has its own order");
    // The order is the permutation of the stream `order` at (seed, epoch).
    let mut order: Vec<usize> = (0..18).collect();
    segdistill_ops::rng::Stream::new(5, "order", &[1]).shuffle(&mut order);
    assert_eq!(second, order[..16].iter().map(|i| format!("n{i}")).collect::<Vec<_>>());
}

#[test]
fn a_panic_in_a_worker_is_an_error_that_names_the_sample() {
    for workers in [0, 1, 3] {
        let data = Numbers { panics_at: Some(13), ..Numbers::new(16) };
        let loader = Loader::new(Arc::new(data), None, config(workers, 2)).unwrap();
        let mut seen = 0;
        let mut batches = loader.iter_from(0);
        let error = loop {
            match batches.next().expect("the error comes before the end") {
                Ok(batch) => {
                    assert!(!batch.names.contains(&"n13".to_string()));
                    seen += 1;
                }
                Err(error) => break error.to_string(),
            }
        };
        assert!(
            seen < 4 && error.contains("`n13`") && error.contains("panicked") && error.contains("the drawer broke"),
            "{error}"
        );
        assert!(error.contains(&format!("step {seen}")), "{error}");
        assert!(batches.next().is_none(), "after an error the iterator is at its end");
    }
}

#[test]
fn an_error_of_the_data_set_or_the_transform_reaches_the_caller() {
    let data = Numbers { fails_at: Some(2), ..Numbers::new(8) };
    let loader = Loader::new(Arc::new(data), None, config(2, 1)).unwrap();
    let error = loader.iter_from(0).find_map(std::result::Result::err).unwrap().to_string();
    assert!(error.contains("`n2`") && error.contains("this sample is bad"), "{error}");
}

#[test]
fn of_several_bad_samples_the_first_in_the_batch_speaks_every_time() {
    let mut errors = std::collections::BTreeSet::new();
    for round in 0..10 {
        let delay = move |i: usize| Duration::from_micros((i as u64 * 31 + round * 17) % 400);
        let data = Numbers { panics_at: Some(1), fails_at: Some(3), delay: Box::new(delay), ..Numbers::new(4) };
        let loader = Loader::new(Arc::new(data), None, config(4, 2)).unwrap();
        errors.insert(loader.iter_from(0).next().unwrap().unwrap_err().to_string());
    }
    assert_eq!(errors.len(), 1, "{errors:?}");
}

#[test]
fn a_slow_consumer_meets_a_bounded_queue() {
    let data = Arc::new(Numbers::new(400));
    let loader = Loader::new(data.clone(), None, config(3, 2)).unwrap();
    let mut batches = loader.iter_from(0);
    for taken in 1..=5 {
        batches.next().unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        let made = data.made.load(Ordering::SeqCst);
        assert!(made <= (taken + 2) * 4, "{made} samples made after {taken} batches");
    }
    // It does work ahead, up to the bound.
    assert_eq!(data.made.load(Ordering::SeqCst), 28);
}

#[test]
fn dropping_it_anywhere_ends_its_threads_soon() {
    for (taken, workers) in [(0, 3), (1, 1), (3, 4)] {
        let data = Arc::new(Numbers { delay: Box::new(|_| Duration::from_millis(3)), ..Numbers::new(64) });
        let loader = Loader::new(data.clone(), Some(transform()), config(workers, 3)).unwrap();
        let mut batches = loader.iter_from(0);
        for _ in 0..taken {
            batches.next().unwrap().unwrap();
        }
        let start = Instant::now();
        drop(batches);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        drop(loader);
        // Threads hold the data set; once they are joined nobody but the test does.
        assert_eq!(Arc::strong_count(&data), 1);
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let fail = |n, cfg, t| Loader::new(Arc::new(Numbers::new(n)), t, cfg).err().unwrap().to_string();
    assert!(fail(3, config(1, 1), None).contains("numbers train has 3 samples, a batch takes 4"));
    assert!(fail(8, LoaderConfig { batch_size: 0, ..config(1, 1) }, None).contains("batch_size = 0"));
    assert!(fail(8, config(1, 0), None).contains("prefetch = 0"));
    let bad = TrainTransform { flip: 2.0, ..TrainTransform::plain([4, 4]) };
    assert!(fail(8, config(1, 1), Some(bad)).contains("flip = 2"));
}

#[test]
fn a_cache_changes_nothing_and_makes_each_sample_once() {
    let plain = Numbers::new(8);
    let expected: Vec<Sample> = (0..8).map(|i| plain.sample(i).unwrap()).collect();
    let inner = Arc::new(Numbers::new(8));
    let cache = DecodedCache::new(inner.clone(), None, 5 * 144);
    for round in 1..=3 {
        for (i, sample) in expected.iter().enumerate() {
            assert_eq!(&cache.sample(i).unwrap(), sample);
        }
        // Five samples of 6x6 pixels fit; the other three are made each time.
        assert_eq!((inner.made.load(Ordering::SeqCst), cache.bytes()), (5 + 3 * round, 5 * 144));
    }
    let small = DecodedCache::new(inner, Some([3, 2]), usize::MAX);
    assert_eq!((small.sample(1).unwrap().image.hw(), small.sample(1).unwrap().labels.hw()), ([3, 2], [3, 2]));
    assert!(small.sample(7).is_ok());
}
