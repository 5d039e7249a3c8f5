//! What a split holds: pixels by class, images by class, mean and deviation of colour, class weights.

use serde::Serialize;

use crate::classes::VOID;
use crate::error::{DataError, Result};
use crate::sample::Dataset;

/// Counts over a split. All sums are whole numbers, so the result does not depend on the number of threads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Images counted.
    pub n_images: usize,
    /// Pixels of each class.
    pub class_pixels: Vec<u64>,
    /// Pixels of void.
    pub void_pixels: u64,
    /// Images that hold the class.
    pub images_with_class: Vec<u64>,
    /// All pixels, void too, of the images that hold the class.
    pub pixels_of_images_with_class: Vec<u64>,
    rgb_sum: [u64; 3],
    rgb_square_sum: [u64; 3],
}

impl Stats {
    /// Counts a whole split, on as many threads as the machine offers.
    ///
    /// # Errors
    /// The first sample's error, by index within a thread's share.
    pub fn of(dataset: &dyn Dataset) -> Result<Self> {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from).min(dataset.len().max(1));
        let share = |thread: usize| -> Result<Self> {
            let mut stats = Self::empty(dataset.classes().n_classes());
            for index in (thread..dataset.len()).step_by(n_threads) {
                stats.count(dataset, index)?;
            }
            Ok(stats)
        };
        let shares: Vec<Result<Self>> = std::thread::scope(|scope| {
            let share = &share;
            let threads: Vec<_> = (0..n_threads).map(|t| scope.spawn(move || share(t))).collect();
            let joined = threads.into_iter().map(|t| t.join());
            joined.map(|j| j.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let mut total = Self::empty(dataset.classes().n_classes());
        for share in shares {
            total.merge(&share?);
        }
        Ok(total)
    }

    fn empty(n_classes: usize) -> Self {
        let zeros = vec![0; n_classes];
        Self {
            class_pixels: zeros.clone(),
            images_with_class: zeros.clone(),
            pixels_of_images_with_class: zeros,
            ..Self::default()
        }
    }

    fn count(&mut self, dataset: &dyn Dataset, index: usize) -> Result<()> {
        let sample = dataset.sample(index)?;
        let mut pixels = [0u64; 256];
        sample.labels.ids.iter().for_each(|id| pixels[usize::from(*id)] += 1);
        let n_classes = self.class_pixels.len();
        if let Some(id) = (n_classes..usize::from(VOID)).find(|id| pixels[*id] > 0) {
            let place = sample.labels.ids.iter().position(|found| usize::from(*found) == id).unwrap_or(0);
            return Err(DataError::LabelValue {
                path: sample.name.into(),
                row: place / sample.labels.width,
                column: place % sample.labels.width,
                found: id as u8,
                expected: format!("0..={} or void {VOID}", n_classes.saturating_sub(1)),
                hint: "the data set hands out ids outside its own table",
            });
        }
        for (class, n) in pixels[..n_classes].iter().enumerate().filter(|(_, n)| **n > 0) {
            self.class_pixels[class] += n;
            self.images_with_class[class] += 1;
            self.pixels_of_images_with_class[class] += sample.labels.ids.len() as u64;
        }
        self.void_pixels += pixels[usize::from(VOID)];
        for pixel in sample.image.rgb.chunks_exact(3) {
            for c in 0..3 {
                let v = u64::from(pixel[c]);
                self.rgb_sum[c] += v;
                self.rgb_square_sum[c] += v * v;
            }
        }
        self.n_images += 1;
        Ok(())
    }

    fn merge(&mut self, other: &Self) {
        let add = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        add(&mut self.class_pixels, &other.class_pixels);
        add(&mut self.images_with_class, &other.images_with_class);
        add(&mut self.pixels_of_images_with_class, &other.pixels_of_images_with_class);
        add(&mut self.rgb_sum, &other.rgb_sum);
        add(&mut self.rgb_square_sum, &other.rgb_square_sum);
        self.void_pixels += other.void_pixels;
        self.n_images += other.n_images;
    }

    /// All pixels, void too.
    pub fn n_pixels(&self) -> u64 {
        self.class_pixels.iter().sum::<u64>() + self.void_pixels
    }

    /// Share of each class among the pixels that are not void, as a fraction; 0 for each when all is void.
    pub fn class_shares(&self) -> Vec<f64> {
        let total = self.class_pixels.iter().sum::<u64>().max(1) as f64;
        self.class_pixels.iter().map(|n| *n as f64 / total).collect()
    }

    /// Mean of each channel over all pixels, in [0, 1].
    pub fn rgb_mean(&self) -> [f64; 3] {
        let n = self.n_pixels().max(1) as f64;
        self.rgb_sum.map(|sum| sum as f64 / n / 255.0)
    }

    /// Standard deviation of each channel over all pixels, in [0, 1].
    pub fn rgb_std(&self) -> [f64; 3] {
        let n = self.n_pixels().max(1) as f64;
        let mean = self.rgb_mean();
        std::array::from_fn(|c| {
            (self.rgb_square_sum[c] as f64 / n / (255.0 * 255.0) - mean[c] * mean[c]).max(0.0).sqrt()
        })
    }

    /// Class weights `median(f) / f` with `f = pixels of the class / pixels of the images that hold it`.
    ///
    /// A class that no image holds weighs 0 and is left out of the median; an even number of values takes the mean of
    /// the middle two.
    ///
    /// # Source
    /// Eigen and Fergus 2015, section 6.3.2, as SegNet uses it.
    pub fn median_frequency_weights(&self) -> Vec<f64> {
        let frequency: Vec<f64> = (self.class_pixels.iter().zip(&self.pixels_of_images_with_class))
            .map(|(class, all)| if *all == 0 { 0.0 } else { *class as f64 / *all as f64 })
            .collect();
        let mut sorted: Vec<f64> = frequency.iter().copied().filter(|f| *f > 0.0).collect();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return frequency };
        let median = (sorted[last / 2] + sorted[last.div_ceil(2)]) / 2.0;
        frequency.iter().map(|f| if *f > 0.0 { median / f } else { 0.0 }).collect()
    }
}
