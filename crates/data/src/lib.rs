//! Data sets, transforms and batches for semantic segmentation.
//!
//! The way of a sample: a [`Manifest`] says what a data set holds, [`LabelledFiles`] reads it from files ([`CamVid`],
//! [`Cityscapes`]) and [`StreetScenes`] draws it from a seed; both are a [`Dataset`] of [`Sample`]s. A [`transform::TrainTransform`] changes image and labels
//! together, and a [`Loader`] makes [`Batch`]es of them on worker threads, in an order that depends on the seed only.
//! [`check`](mod@check), [`stats`] and [`preview`] look at a data set without training on it.
//!
//! What does not live here: networks, losses, scores, and anything that knows a training step's result.
//!
//! # Example
//! Scenes drawn from a seed, cropped at random and joined into a batch; nothing is downloaded.
//! ```
//! use std::sync::Arc;
//! use segdistill_data::transform::TrainTransform;
//! use segdistill_data::{Dataset, Loader, LoaderConfig, Split, StreetScenes, StreetScenesConfig, VOID};
//!
//! let cfg = StreetScenesConfig { height: 48, width: 64, seed: 7, variety: 1.0, n_train: 6, n_val: 2, n_test: 2 };
//! let scenes = StreetScenes::new(cfg, Split::Train)?;
//! let sample = scenes.sample(0)?;
//! assert_eq!(sample.image.rgb.len(), 48 * 64 * 3);
//! assert!(sample.labels.ids.iter().all(|id| *id < 11 || *id == VOID));
//!
//! let transform = TrainTransform { scale: [0.5, 2.0], flip: 0.5, ..TrainTransform::plain([32, 32]) };
//! let loader = LoaderConfig { batch_size: 2, workers: 1, prefetch: 2, seed: 0 };
//! let loader = Loader::new(Arc::new(scenes), Some(transform), loader)?;
//! assert_eq!(loader.steps_per_epoch(), 3);
//! for batch in loader.iter_from(0).take(4) {
//!     let batch = batch?;
//!     assert_eq!(batch.images_nchw.dims(), [2, 3, 32, 32]);
//!     assert_eq!(batch.labels_nhw.dims(), [2, 32, 32]);
//! }
//! # Ok::<(), segdistill_data::DataError>(())
//! ```
#![forbid(unsafe_code)]

mod batch;
mod cache;
pub mod check;
pub mod classes;
mod codec;
mod error;
mod files;
mod loader;
pub mod manifest;
mod pairs;
pub mod preview;
mod resize;
mod sample;
pub mod stats;
mod street;
pub mod transform;

pub use batch::{Batch, collate};
pub use cache::DecodedCache;
pub use classes::{Class, ClassTable, VOID};
pub use error::{DataError, Result};
pub use files::{CamVid, Cityscapes, LabelledFiles};
pub use loader::{BatchIter, Loader, LoaderConfig};
pub use manifest::Manifest;
pub use sample::{Dataset, LabelMap, RgbImage, Sample, Split};
pub use street::{StreetScenes, StreetScenesConfig};
