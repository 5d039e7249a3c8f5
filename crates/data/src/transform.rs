//! What training does to a sample: size, scale, crop, flip and colour, image and labels together.
//!
//! Every draw comes from a stream named by (seed, epoch, index), so a sample looks the same in a run that was resumed.

use segdistill_ops::rng::Stream;

use crate::classes::VOID;
use crate::error::{DataError, Result};
use crate::sample::{LabelMap, RgbImage, Sample};

pub use crate::resize::{resize_image_bilinear, resize_labels_nearest};

/// Colour of image pixels beyond the picture: ImageNet's mean colour, which normalised input maps to about 0.
pub const PAD_RGB: [u8; 3] = [124, 116, 104];

/// What the random draws of one sample depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleKey {
    /// Seed of the run.
    pub seed: u64,
    /// Pass over the data.
    pub epoch: u64,
    /// Index of the sample in its data set.
    pub index: u64,
}

/// The transforms of training, in this order: to `base_hw`, random scale, random crop with padding, flip, colour jitter.
///
/// Images are read bilinear, labels nearest. Where the crop reaches beyond the scaled picture the labels are
/// [`VOID`] and the image is [`PAD_RGB`], which the jitter leaves alone.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainTransform {
    /// Height and width every sample is brought to first; `None` keeps its own.
    pub base_hw: Option<[usize; 2]>,
    /// Least and greatest scale factor, uniform between; both sides alike. Within 0.25..=8.
    pub scale: [f64; 2],
    /// Height and width of the crop, in pixels.
    pub crop_hw: [usize; 2],
    /// Probability of a left-right flip.
    pub flip: f64,
    /// Factor of brightness, uniform in 1 - x ..= 1 + x.
    pub brightness: f64,
    /// Factor of contrast about the picture's mean grey, uniform in 1 - x ..= 1 + x.
    pub contrast: f64,
    /// Factor of saturation about each pixel's grey, uniform in 1 - x ..= 1 + x.
    pub saturation: f64,
}

impl TrainTransform {
    /// No randomness: the middle of neither scale nor colour is moved, the crop is the picture.
    pub fn plain(crop_hw: [usize; 2]) -> Self {
        Self { base_hw: None, scale: [1.0, 1.0], crop_hw, flip: 0.0, brightness: 0.0, contrast: 0.0, saturation: 0.0 }
    }

    /// Errors unless every setting is in its range.
    ///
    /// # Errors
    /// `Config` naming the setting.
    pub fn check(&self) -> Result<()> {
        let [low, high] = self.scale;
        if !(0.25..=8.0).contains(&low) || !(low..=8.0).contains(&high) {
            return Err(DataError::config(
                format!("scale = {:?}", self.scale),
                "give [least, greatest] within 0.25..=8",
            ));
        }
        if self.crop_hw.contains(&0) || self.base_hw.is_some_and(|hw| hw.contains(&0)) {
            let what = format!("crop_hw = {:?}, base_hw = {:?}", self.crop_hw, self.base_hw);
            return Err(DataError::config(what, "give [height, width] above 0"));
        }
        let named = [
            ("flip", self.flip),
            ("brightness", self.brightness),
            ("contrast", self.contrast),
            ("saturation", self.saturation),
        ];
        for (name, value) in named {
            if !(0.0..=1.0).contains(&value) {
                return Err(DataError::config(format!("{name} = {value}"), "give a value within 0..=1"));
            }
        }
        Ok(())
    }

    /// Transforms one sample.
    ///
    /// # Shapes
    /// The result is `crop_hw`, image and labels alike.
    /// # Errors
    /// `Config` for a setting out of range; `PairSize` when the sample's own sizes differ.
    pub fn apply(&self, sample: &Sample, key: SampleKey) -> Result<Sample> {
        self.check()?;
        sample.check_sizes()?;
        let resized;
        let sample = match self.base_hw {
            Some(hw) if hw != sample.image.hw() => {
                resized = Sample {
                    image: resize_image_bilinear(&sample.image, hw)?,
                    labels: resize_labels_nearest(&sample.labels, hw)?,
                    name: sample.name.clone(),
                };
                &resized
            }
            _ => sample,
        };
        let mut draw = Stream::new(key.seed, "train transform", &[key.epoch, key.index]);
        let factor = draw.uniform(self.scale[0], self.scale[1]);
        let scaled = |side: usize| ((side as f64 * factor).round() as usize).max(1);
        let (source_h, source_w) = (sample.image.height, sample.image.width);
        let rows = Window::draw(&mut draw, source_h, scaled(source_h), self.crop_hw[0]);
        let columns = Window::draw(&mut draw, source_w, scaled(source_w), self.crop_hw[1]);
        let flip = draw.chance(self.flip);
        let mut around_one = |reach: f64| draw.uniform(1.0 - reach, 1.0 + reach) as f32;
        let jitter = [around_one(self.brightness), around_one(self.contrast), around_one(self.saturation)];

        let (rows, mut columns) = (rows.places(), columns.places());
        if flip {
            columns.reverse();
        }
        let labels = gather_labels(&sample.labels, &rows, &columns);
        let mut image = gather_image(&sample.image, &rows, &columns);
        jitter_colors(&mut image, &rows, &columns, jitter);
        Ok(Sample { image, labels, name: sample.name.clone() })
    }
}

/// One axis of a crop: which part of the scaled picture it shows.
struct Window {
    source: usize,
    scaled: usize,
    crop: usize,
    /// Place of the crop's first pixel in the scaled picture; negative where padding comes first.
    offset: i64,
}

/// Where a crop pixel reads along one axis: two source pixels and the share of the second, and the nearest one.
#[derive(Clone, Copy)]
struct Place {
    low: usize,
    high: usize,
    share: f32,
    nearest: usize,
}

impl Window {
    /// Any offset for which the crop lies in the picture, or the picture in the crop.
    fn draw(draw: &mut Stream, source: usize, scaled: usize, crop: usize) -> Self {
        let slack = scaled as i64 - crop as i64;
        Self { source, scaled, crop, offset: draw.between(slack.min(0), slack.max(0)) }
    }

    /// For each crop pixel its place, `None` beyond the picture.
    fn places(&self) -> Vec<Option<Place>> {
        let ratio = self.source as f64 / self.scaled as f64;
        let place = |i: usize| {
            let at = usize::try_from(i as i64 + self.offset).ok().filter(|at| *at < self.scaled)?;
            let centre = ((at as f64 + 0.5) * ratio - 0.5).clamp(0.0, (self.source - 1) as f64);
            let low = centre as usize;
            Some(Place {
                low,
                high: (low + 1).min(self.source - 1),
                share: (centre - low as f64) as f32,
                nearest: (2 * at + 1) * self.source / (2 * self.scaled),
            })
        };
        (0..self.crop).map(place).collect()
    }
}

fn gather_labels(labels: &LabelMap, rows: &[Option<Place>], columns: &[Option<Place>]) -> LabelMap {
    let mut out = LabelMap::filled(rows.len(), columns.len(), VOID);
    for (row, target) in rows.iter().zip(out.ids.chunks_exact_mut(columns.len())) {
        let Some(row) = row else { continue };
        let source = &labels.ids[row.nearest * labels.width..][..labels.width];
        for (column, id) in columns.iter().zip(target) {
            if let Some(column) = column {
                *id = source[column.nearest];
            }
        }
    }
    out
}

fn gather_image(image: &RgbImage, rows: &[Option<Place>], columns: &[Option<Place>]) -> RgbImage {
    let mut out = RgbImage::filled(rows.len(), columns.len(), PAD_RGB);
    let line = image.width * 3;
    let mut blended = vec![0f32; line];
    for (row, target) in rows.iter().zip(out.rgb.chunks_exact_mut(columns.len() * 3)) {
        let Some(row) = row else { continue };
        let (upper, lower) = (&image.rgb[row.low * line..][..line], &image.rgb[row.high * line..][..line]);
        for ((b, u), l) in blended.iter_mut().zip(upper).zip(lower) {
            *b = f32::from(*u) + (f32::from(*l) - f32::from(*u)) * row.share;
        }
        for (column, pixel) in columns.iter().zip(target.chunks_exact_mut(3)) {
            let Some(column) = column else { continue };
            for c in 0..3 {
                let (left, right) = (blended[column.low * 3 + c], blended[column.high * 3 + c]);
                pixel[c] = (left + (right - left) * column.share + 0.5) as u8;
            }
        }
    }
    out
}

/// Brightness, then contrast, then saturation, in one pass and rounded once at the end.
///
/// Grey is `0.299 r + 0.587 g + 0.114 b`; the mean grey is that of the pixels shown, after brightness.
///
/// # Source
/// The formulas of torchvision's `ColorJitter`. DIFFERENCE: fixed order, and no rounding in between.
fn jitter_colors(image: &mut RgbImage, rows: &[Option<Place>], columns: &[Option<Place>], factors: [f32; 3]) {
    let [brightness, contrast, saturation] = factors;
    if factors == [1.0; 3] {
        return;
    }
    let grey = |p: &[u8]| 0.299 * f32::from(p[0]) + 0.587 * f32::from(p[1]) + 0.114 * f32::from(p[2]);
    let line = columns.len() * 3;
    let shown = |places: &[Option<Place>]| {
        let first = places.iter().position(Option::is_some).unwrap_or(0);
        first..first + places.iter().flatten().count()
    };
    let (rows, columns) = (shown(rows), shown(columns));
    let n = (rows.len() * columns.len()).max(1);
    let span = columns.start * 3..columns.end * 3;
    let mut sum = 0f64;
    for row in rows.clone() {
        sum += f64::from(image.rgb[row * line..][span.clone()].chunks_exact(3).map(grey).sum::<f32>());
    }
    let mean = (sum / n as f64) as f32 * brightness;
    for row in rows {
        for pixel in image.rgb[row * line..][span.clone()].chunks_exact_mut(3) {
            let toned = |v: f32| (v * brightness - mean) * contrast + mean;
            let centre = toned(grey(pixel));
            for v in pixel {
                *v = (centre + (toned(f32::from(*v)) - centre) * saturation + 0.5).clamp(0.0, 255.0) as u8;
            }
        }
    }
}
