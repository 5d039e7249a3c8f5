//! A memory of teacher features: for every class a ring of unit vectors that outlives the step that wrote them.
//!
//! What is compared with it, and how, is the business of the losses.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use segdistill_ops::rng::Stream;

use crate::error::{Result, TrainError};

/// What one image adds to its classes' rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Up to so many of the class's pixels, drawn at random.
    Pixels(usize),
    /// One vector: the mean of the class's unit vectors, of unit length again.
    Region,
}

/// Rings of unit vectors, one for each class.
///
/// Every slot starts as a random direction, as in the source, so that a class never seen still has vectors to compare
/// with. A ring's oldest vector is written over first.
///
/// # Source
/// Yang et al., CVPR 2022, section 3.3. DIFFERENCE to the public code: there the pixels of a class are drawn from the
/// first places of the map, whatever class these have; here from the class's own. There a write that reaches the end of
/// the ring is moved back to fit; here it goes on at the start.
#[derive(Clone, Debug)]
pub struct MemoryBank {
    entry: Entry,
    n_classes: usize,
    n_slots: usize,
    n_channels: usize,
    /// `[class, slot, channel]`.
    slots: Vec<f32>,
    /// Slot of each class that is written next.
    next: Vec<usize>,
    seed: u64,
}

const SLOTS: &str = "slots";
const NEXT: &str = "next";

impl MemoryBank {
    /// A bank of random directions that are a function of `seed`.
    ///
    /// # Errors
    /// `Config` when a size is 0.
    pub fn new(entry: Entry, n_classes: usize, n_slots: usize, n_channels: usize, seed: u64) -> Result<Self> {
        if n_classes * n_slots * n_channels == 0 || entry == Entry::Pixels(0) {
            let what = format!("a memory of {n_classes} classes, {n_slots} slots, {n_channels} channels, {entry:?}");
            return Err(TrainError::config(what, "every size is at least 1"));
        }
        let mut slots = Vec::with_capacity(n_classes * n_slots * n_channels);
        for class in 0..n_classes {
            let mut stream = Stream::new(seed, "memory", &[class as u64]);
            for _ in 0..n_slots {
                let mut direction: Vec<f32> = (0..n_channels).map(|_| stream.normal() as f32).collect();
                to_unit(&mut direction);
                slots.append(&mut direction);
            }
        }
        Ok(Self { entry, n_classes, n_slots, n_channels, slots, next: vec![0; n_classes], seed })
    }

    /// Writes the teacher's features of one step, image by image and class by class.
    ///
    /// # Shapes
    /// - `teacher_ndhw`: `[n, d, h, w]`, of any length
    /// - `labels_nhw`, `valid_nhw`: `[n, h, w]` u8 on the same grid
    /// # Errors
    /// `Config` for another number of channels and for a valid label that is no class; the bank is then unchanged.
    pub fn enqueue(&mut self, teacher_ndhw: &Tensor, labels_nhw: &Tensor, valid_nhw: &Tensor, step: u64) -> Result<()> {
        let (n, d, h, w) = teacher_ndhw.dims4()?;
        if d != self.n_channels || labels_nhw.dims() != [n, h, w] || valid_nhw.dims() != [n, h, w] {
            let what = format!(
                "features {:?}, labels {:?}, validity {:?} for a memory of {} channels",
                teacher_ndhw.dims(),
                labels_nhw.dims(),
                valid_nhw.dims(),
                self.n_channels
            );
            return Err(TrainError::config(what, "pass one grid and the teacher's channels"));
        }
        let features = teacher_ndhw.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let bytes = |map: &Tensor| -> Result<Vec<u8>> { Ok(map.flatten_all()?.to_vec1::<u8>()?) };
        let (labels, valid) = (bytes(labels_nhw)?, bytes(valid_nhw)?);
        let stray = |&(label, valid): &(&u8, &u8)| *valid == 1 && usize::from(*label) >= self.n_classes;
        if let Some((label, _)) = labels.iter().zip(&valid).find(stray) {
            let what = format!("label {label} for a memory of {} classes", self.n_classes);
            return Err(TrainError::config(what, "map the data set's ids to classes when loading"));
        }
        let m = h * w;
        for image in 0..n {
            let map = &features[image * d * m..][..d * m];
            let pixel = |at: usize| -> Vec<f32> {
                let mut vector: Vec<f32> = (0..d).map(|channel| map[channel * m + at]).collect();
                to_unit(&mut vector);
                vector
            };
            let places = places_by_class(&labels[image * m..][..m], &valid[image * m..][..m], self.n_classes);
            for (class, mut places) in places.into_iter().enumerate().filter(|(_, places)| !places.is_empty()) {
                match self.entry {
                    Entry::Region => {
                        let mut mean = vec![0f32; d];
                        for &at in &places {
                            mean.iter_mut().zip(pixel(at)).for_each(|(sum, x)| *sum += x);
                        }
                        to_unit(&mut mean);
                        self.write(class, &mean);
                    }
                    Entry::Pixels(most) => {
                        let index = [step, image as u64, class as u64];
                        Stream::new(self.seed, "memory pixels", &index).shuffle(&mut places);
                        for &at in places.iter().take(most) {
                            self.write(class, &pixel(at));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, class: usize, unit: &[f32]) {
        let slot = self.next[class];
        self.slots[(class * self.n_slots + slot) * self.n_channels..][..self.n_channels].copy_from_slice(unit);
        self.next[class] = (slot + 1) % self.n_slots;
    }

    /// Vectors of every class to compare with in `step`: `contrast / n_classes + 1` slots of each, at most all, the same
    /// slots of every class.
    ///
    /// # Shapes
    /// Returns `[b, d]` of `dtype` on `device`.
    /// # Errors
    /// `Candle` when the tensor cannot be made.
    pub fn sample(&self, contrast: usize, step: u64, dtype: DType, device: &Device) -> Result<Tensor> {
        let count = (contrast / self.n_classes + 1).min(self.n_slots);
        let mut order: Vec<usize> = (0..self.n_slots).collect();
        Stream::new(self.seed, "memory contrast", &[step]).shuffle(&mut order);
        let d = self.n_channels;
        let mut bank = Vec::with_capacity(self.n_classes * count * d);
        for class in 0..self.n_classes {
            for slot in &order[..count] {
                bank.extend_from_slice(&self.slots[(class * self.n_slots + slot) * d..][..d]);
            }
        }
        Ok(Tensor::from_vec(bank, (self.n_classes * count, d), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
    }

    /// The vectors of one class, `[slots, d]`, oldest place first.
    ///
    /// # Errors
    /// `Candle` when the tensor cannot be made.
    pub fn class(&self, class: usize) -> Result<Tensor> {
        let size = self.n_slots * self.n_channels;
        let slots = self.slots[class * size..][..size].to_vec();
        Ok(Tensor::from_vec(slots, (self.n_slots, self.n_channels), &Device::Cpu)?)
    }

    /// Slot of each class that is written next.
    pub fn next(&self) -> &[usize] {
        &self.next
    }

    /// Everything that outlives a step, for the checkpoint.
    ///
    /// # Errors
    /// `Candle` when a tensor cannot be made.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let shape = (self.n_classes, self.n_slots, self.n_channels);
        let slots = Tensor::from_vec(self.slots.clone(), shape, &Device::Cpu)?;
        let next: Vec<i64> = self.next.iter().map(|&slot| slot as i64).collect();
        let next = Tensor::from_vec(next, self.n_classes, &Device::Cpu)?;
        Ok(BTreeMap::from([(SLOTS.to_string(), slots), (NEXT.to_string(), next)]))
    }

    /// Takes the state of a checkpoint, whole or not at all.
    ///
    /// # Errors
    /// `Config` when it is that of a bank of other sizes.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let differs = |what: String| TrainError::config(what, "resume with the objective the run was started with");
        let tensor = |name: &str| state.get(name).ok_or_else(|| differs(format!("the memory's `{name}` is missing")));
        let (slots, next) = (tensor(SLOTS)?, tensor(NEXT)?);
        let shape = [self.n_classes, self.n_slots, self.n_channels];
        if slots.dims() != shape || next.dims() != [self.n_classes] {
            return Err(differs(format!("the memory was {:?}, is {shape:?}", slots.dims())));
        }
        let next = next.to_vec1::<i64>()?;
        let pointer = |slot: &i64| usize::try_from(*slot).ok().filter(|slot| *slot < self.n_slots);
        let next: Option<Vec<usize>> = next.iter().map(pointer).collect();
        let next = next.ok_or_else(|| differs("a pointer of the memory lies outside its ring".to_string()))?;
        (self.slots, self.next) = (slots.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?, next);
        Ok(())
    }
}

/// Places of each class's valid pixels, in row-major order.
fn places_by_class(labels: &[u8], valid: &[u8], n_classes: usize) -> Vec<Vec<usize>> {
    let mut places = vec![Vec::new(); n_classes];
    for (at, (label, _)) in labels.iter().zip(valid).enumerate().filter(|(_, (_, valid))| **valid == 1) {
        places[usize::from(*label)].push(at);
    }
    places
}

/// Scales a vector to length 1; a vector of length at most 1e-12 becomes 0.
fn to_unit(vector: &mut [f32]) {
    let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    let scale = if norm <= 1e-12 { 0.0 } else { 1.0 / norm };
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One image of `h x 4` pixels and 2 channels; pixel `k` points in the direction `(1, k)`.
    fn features(h: usize) -> Tensor {
        let m = h * 4;
        let values: Vec<f32> = (0..m).map(|_| 1.0).chain((0..m).map(|k| k as f32)).collect();
        Tensor::from_vec(values, (1, 2, h, 4), &Device::Cpu).unwrap()
    }

    fn labels(h: usize, of: impl Fn(usize) -> u8) -> Tensor {
        Tensor::from_vec((0..h * 4).map(of).collect::<Vec<u8>>(), (1, h, 4), &Device::Cpu).unwrap()
    }

    /// The pixel a written vector came from.
    fn origin(vector: &[f32]) -> f32 {
        (vector[1] / vector[0] * 1000.0).round() / 1000.0
    }

    #[test]
    fn a_class_of_the_last_rows_fills_its_ring_with_its_own_pixels() {
        // Class 1 lives in the last row alone: pixels 28 to 31.
        let mut bank = MemoryBank::new(Entry::Pixels(16), 2, 6, 2, 5).unwrap();
        let labels = labels(8, |k| u8::from(k >= 28));
        let valid = labels.ones_like().unwrap();
        bank.enqueue(&features(8), &labels, &valid, 0).unwrap();
        let rows = bank.class(1).unwrap().to_vec2::<f32>().unwrap();
        let mut found: Vec<f32> = rows[..4].iter().map(|row| origin(row)).collect();
        found.sort_by(f32::total_cmp);
        assert_eq!(found, [28.0, 29.0, 30.0, 31.0]);
        // Class 0 has 28 pixels: 16 are drawn, and its ring of 6 keeps the last 6 of these.
        assert_eq!(bank.next(), [16 % 6, 4]);
        let rows = bank.class(0).unwrap().to_vec2::<f32>().unwrap();
        assert!(rows.iter().all(|row| origin(row) < 28.0 && (row[0].hypot(row[1]) - 1.0).abs() < 1e-6));
    }

    #[test]
    fn rings_wrap_and_forget_the_oldest() {
        let mut bank = MemoryBank::new(Entry::Region, 1, 3, 2, 5).unwrap();
        for step in 0..4 {
            let labels = labels(1, |_| 0);
            let valid =
                Tensor::from_vec((0..4).map(|k| u8::from(k == step)).collect::<Vec<u8>>(), (1, 1, 4), &Device::Cpu);
            bank.enqueue(&features(1), &labels, &valid.unwrap(), step as u64).unwrap();
        }
        assert_eq!(bank.next(), [1]);
        let rows = bank.class(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows.iter().map(|row| origin(row)).collect::<Vec<_>>(), [3.0, 1.0, 2.0]);
    }

    #[test]
    fn a_region_is_the_mean_direction_of_its_pixels() {
        let mut bank = MemoryBank::new(Entry::Region, 3, 4, 2, 5).unwrap();
        let labels = labels(1, |k| if k < 2 { 2 } else { 255 });
        let valid = Tensor::new(&[[[1u8, 1, 0, 0]]], &Device::Cpu).unwrap();
        bank.enqueue(&features(1), &labels, &valid, 0).unwrap();
        assert_eq!(bank.next(), [0, 0, 1]);
        let angle = bank.class(2).unwrap().to_vec2::<f32>().unwrap()[0][1].asin();
        assert!((angle - std::f32::consts::FRAC_PI_8).abs() < 1e-6, "{angle}: halfway between 0 and 45 degrees");
    }

    #[test]
    fn samples_take_the_same_slots_of_every_class_and_depend_on_the_step_alone() {
        let bank = MemoryBank::new(Entry::Region, 4, 20, 3, 9).unwrap();
        let sample = |step| bank.sample(10, step, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(sample(0).dims(), [4 * 3, 3]);
        assert_eq!(sample(7).to_vec2::<f32>().unwrap(), sample(7).to_vec2::<f32>().unwrap());
        assert_ne!(sample(7).to_vec2::<f32>().unwrap(), sample(8).to_vec2::<f32>().unwrap());
        let all = bank.sample(1000, 0, DType::F64, &Device::Cpu).unwrap();
        assert_eq!(all.dims(), [4 * 20, 3]);
        let place = |class: usize, row: &[f32]| {
            bank.class(class).unwrap().to_vec2::<f32>().unwrap().iter().position(|slot| slot == row).unwrap()
        };
        let rows = sample(3).to_vec2::<f32>().unwrap();
        let of = |class: usize| (0..3).map(|k| place(class, &rows[class * 3 + k])).collect::<Vec<_>>();
        assert!((1..4).all(|class| of(class) == of(0)));
    }

    #[test]
    fn state_survives_bit_for_bit_and_other_sizes_are_refused() {
        let mut bank = MemoryBank::new(Entry::Pixels(2), 2, 5, 2, 5).unwrap();
        let labels = labels(2, |k| (k % 2) as u8);
        bank.enqueue(&features(2), &labels, &labels.ones_like().unwrap(), 3).unwrap();
        let bytes = crate::checkpoint::to_safetensors(&bank.state().unwrap()).unwrap();
        let read = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect();
        let mut other = MemoryBank::new(Entry::Pixels(2), 2, 5, 2, 77).unwrap();
        other.load_state(&read).unwrap();
        assert_eq!((other.slots.clone(), other.next.clone()), (bank.slots.clone(), bank.next.clone()));
        let mut small = MemoryBank::new(Entry::Region, 2, 4, 2, 5).unwrap();
        let before = small.slots.clone();
        assert!(small.load_state(&read).unwrap_err().to_string().contains("[2, 5, 2]"));
        assert_eq!(small.slots, before);
    }

    #[test]
    fn labels_that_are_no_class_change_nothing() {
        let mut bank = MemoryBank::new(Entry::Region, 2, 4, 2, 5).unwrap();
        let before = bank.slots.clone();
        let labels = labels(1, |k| k as u8);
        let error = bank.enqueue(&features(1), &labels, &labels.ones_like().unwrap(), 0).unwrap_err();
        assert!(error.to_string().contains("label 2"), "{error}");
        assert_eq!((bank.slots, bank.next), (before, vec![0, 0]));
    }
}
