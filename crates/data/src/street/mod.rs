//! Street scenes drawn from a seed, in CamVid's classes, with exact labels.
//!
//! A scene is laid out in metres (camera, sun, street, walls, what stands and moves), painted at twice the
//! resolution, and developed: colours are averaged, a pixel's label is the vote of its four samples, ties going to
//! thin and near things. Colours are shared between classes on purpose, so that a pixel's colour tells little.

mod backdrop;
mod building;
mod canvas;
mod cast;
mod furniture;
mod ids;
mod light;
mod noise;
mod people;
mod scene;
mod town;
mod vehicle;
mod weather;

use segdistill_ops::rng::Stream;

use crate::classes::ClassTable;
use crate::error::{DataError, Result};
use crate::manifest::Manifest;
use crate::sample::{Dataset, Sample, Split};

/// Which scenes are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct StreetScenesConfig {
    /// Rows, at least 32.
    pub height: usize,
    /// Columns, at least 32.
    pub width: usize,
    /// Seed; another seed gives other scenes.
    pub seed: u64,
    /// How little a look tells of a class, within 0..=1. At 1 colours are shared between classes on purpose, light and
    /// weather vary fully and far things are thin; towards 0 each class keeps to a tone of its own, the light is even
    /// and thin things are thicker: the same streets, learned in fewer steps.
    pub variety: f64,
    /// Scenes in train.
    pub n_train: usize,
    /// Scenes in val.
    pub n_val: usize,
    /// Scenes in test.
    pub n_test: usize,
}

/// First scene number of val; train begins at 0, test at twice this. The ranges cannot meet.
const SPLIT_STRIDE: u64 = 1 << 40;

/// A split of drawn street scenes.
///
/// A sample is a pure function of (config, split, index): nothing is stored, and the number of scenes changes none of
/// them. The same scene at another size shows the same street.
///
/// # Example
/// ```
/// use segdistill_data::{Dataset, Split, StreetScenes, StreetScenesConfig};
/// let cfg = StreetScenesConfig { height: 96, width: 128, seed: 1, variety: 1.0, n_train: 10, n_val: 5, n_test: 5 };
/// let val = StreetScenes::new(cfg, Split::Val)?;
/// assert_eq!(val.sample(3)?, val.sample(3)?);
/// # Ok::<(), segdistill_data::DataError>(())
/// ```
#[derive(Clone, Debug)]
pub struct StreetScenes {
    cfg: StreetScenesConfig,
    split: Split,
    manifest: Manifest,
}

impl StreetScenes {
    /// The scenes of a split.
    ///
    /// # Errors
    /// `Config` for a side below 32 or above 8192, a variety outside 0..=1, or a split of no scenes.
    pub fn new(cfg: StreetScenesConfig, split: Split) -> Result<Self> {
        let sides = 32..=8192;
        if !sides.contains(&cfg.height) || !sides.contains(&cfg.width) {
            let what = format!("street scenes of {}x{} (height x width)", cfg.height, cfg.width);
            return Err(DataError::config(what, "each side is within 32..=8192"));
        }
        if !(0.0..=1.0).contains(&cfg.variety) {
            return Err(DataError::config(format!("variety = {}", cfg.variety), "within 0..=1; 1 is the full variety"));
        }
        let scenes = Self { cfg, split, manifest: Manifest::named("street-scenes")? };
        if scenes.is_empty() {
            return Err(DataError::config(format!("n_{split} = 0"), "draw at least one scene"));
        }
        Ok(scenes)
    }

    fn first(&self) -> u64 {
        match self.split {
            Split::Train => 0,
            Split::Val => SPLIT_STRIDE,
            Split::Test => 2 * SPLIT_STRIDE,
        }
    }
}

impl Dataset for StreetScenes {
    fn len(&self) -> usize {
        match self.split {
            Split::Train => self.cfg.n_train,
            Split::Val => self.cfg.n_val,
            Split::Test => self.cfg.n_test,
        }
    }

    fn sample(&self, index: usize) -> Result<Sample> {
        if index >= self.len() {
            let (id, split) = (self.manifest.id.clone(), self.split.to_string());
            return Err(DataError::Index { id, split, index, len: self.len() });
        }
        let number = self.first() + index as u64;
        let mut dice = noise::Dice::new(Stream::new(self.cfg.seed, "street scene", &[number]), self.cfg.variety);
        let (image, labels) = scene::Scene::draw(&mut dice, self.cfg.height, self.cfg.width).paint();
        Ok(Sample { image, labels, name: self.sample_name(index) })
    }

    fn classes(&self) -> &ClassTable {
        &self.manifest.classes
    }

    fn id(&self) -> &str {
        &self.manifest.id
    }

    fn split(&self) -> Split {
        self.split
    }

    fn sample_name(&self, index: usize) -> String {
        format!("{}-{}-{index:05}", self.split, self.cfg.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_manifest() {
        let table = Manifest::named("street-scenes").unwrap().classes;
        for (id, name) in ids::NAMES {
            assert_eq!(table.index_of(name), Some(usize::from(id)), "{name}");
        }
        assert_eq!(table.n_classes(), ids::NAMES.len());
    }
}
