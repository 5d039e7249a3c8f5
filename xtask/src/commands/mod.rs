//! One module a command, and what several of them share.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Device;

use segdistill_data::{Dataset, DecodedCache, LabelledFiles, Manifest, Split, StreetScenes, StreetScenesConfig};
use segdistill_ops::device::{allow_tf32, n_cuda_devices, open_cuda};

use crate::cli::DeviceArgs;
use crate::exit::{DATA, UNAVAILABLE, USAGE, coded, usage};
use crate::recipe::DataPlan;

pub(crate) mod bench;
pub(crate) mod ci;
pub(crate) mod data;
pub(crate) mod eval;
pub(crate) mod models;
pub(crate) mod predict;
pub(crate) mod report;
pub(crate) mod reproduce;
pub(crate) mod sweep;
pub(crate) mod tidy;
pub(crate) mod train;
pub(crate) mod weights;

/// Splits in report order.
pub(crate) const SPLITS: [Split; 3] = [Split::Train, Split::Val, Split::Test];

/// The folder of data set `id`: as given, or `$SEGDISTILL_DATA_DIR/<id>`; it must be there.
pub(crate) fn data_root(id: &str, given: Option<PathBuf>) -> Result<PathBuf> {
    let from_env = || std::env::var_os("SEGDISTILL_DATA_DIR").map(|dir| PathBuf::from(dir).join(id));
    let root = given.or_else(from_env).ok_or_else(|| {
        let how = Manifest::named(id).map(|m| m.obtain).unwrap_or_default();
        let why = anyhow::anyhow!("data set {id} needs its folder\n  hint: --data-root DIR, or SEGDISTILL_DATA_DIR with a folder {id} in it. {how}");
        coded(UNAVAILABLE, why)
    })?;
    if !root.is_dir() {
        let why = anyhow::anyhow!(
            "data root `{}` is not a folder\n  hint: --data-root names the folder that holds the data set {id}",
            root.display()
        );
        return Err(coded(UNAVAILABLE, why));
    }
    Ok(root)
}

/// The name of the device to run on: as given, else the first CUDA device if this program and this machine have one, else
/// the CPU.
pub(crate) fn device_name(args: &DeviceArgs) -> String {
    if let Some(given) = &args.device {
        return given.clone();
    }
    match n_cuda_devices() {
        Ok(_) => "cuda:0".into(),
        Err(why) => {
            if cfg!(feature = "cuda") {
                log::warn!("running on the CPU: {why}");
            }
            "cpu".into()
        }
    }
}

/// The device called `name`, never replaced by another, with or without TF32.
pub(crate) fn device(name: &str, tf32: bool) -> Result<Device> {
    if name == "cpu" {
        if tf32 {
            return Err(usage!("--tf32 changes nothing on the CPU\n  hint: leave it out, or add --device cuda:0"));
        }
        return Ok(Device::Cpu);
    }
    let index = name.strip_prefix("cuda:").and_then(|i| i.parse::<usize>().ok());
    let index = index.ok_or_else(|| usage!("unknown device `{name}`, expected cpu or cuda:N"))?;
    let device = open_cuda(index).map_err(|e| usage!("device {name}: {e}"))?;
    allow_tf32(tf32);
    Ok(device)
}

/// One split of the plan's data; `None` when the data set lacks it.
pub(crate) fn open_split(data: &DataPlan, split: Split) -> Result<Option<Arc<dyn Dataset>>> {
    match data {
        DataPlan::StreetScenes { height, width, train, val, test, seed, variety } => {
            if split == Split::Test && *test == 0 {
                return Ok(None);
            }
            let cfg = StreetScenesConfig {
                height: *height,
                width: *width,
                seed: *seed,
                variety: *variety,
                n_train: *train,
                n_val: *val,
                n_test: *test,
            };
            Ok(Some(Arc::new(StreetScenes::new(cfg, split).map_err(|e| coded(USAGE, e))?)))
        }
        DataPlan::Files { dataset, root } => {
            let manifest = Manifest::named(dataset).map_err(|e| coded(USAGE, e))?;
            if !LabelledFiles::has_split(&manifest, root, split) {
                return Ok(None);
            }
            Ok(Some(Arc::new(LabelledFiles::open(manifest, root, split).map_err(|e| coded(DATA, e))?)))
        }
    }
}

/// Memory for decoded training samples: twice what CamVid's train split takes.
const CACHE_BYTES: usize = 512 << 20;

/// Whether `len` decoded samples of `hw`, at four bytes a pixel, fit into [`CACHE_BYTES`].
fn fits_in_cache(len: usize, hw: [usize; 2]) -> bool {
    [len, hw[0], hw[1], 4].into_iter().try_fold(1, usize::checked_mul).is_some_and(|bytes| bytes <= CACHE_BYTES)
}

/// One split that must be there.
///
/// A train split of files, which training goes through many times, is decoded once and then kept in memory where all of
/// it fits, as CamVid's does; its samples are the same. Of one that does not fit, as Cityscapes' 25 GB, nothing is kept:
/// the few samples that would be found again are not worth their memory.
pub(crate) fn need_split(data: &DataPlan, split: Split) -> Result<Arc<dyn Dataset>> {
    let opened = open_split(data, split)?.ok_or_else(|| {
        let why = anyhow::anyhow!(
            "split {split} is absent\n  hint: `cargo xtask data check` says what is there and how to obtain the rest"
        );
        coded(UNAVAILABLE, why)
    })?;
    if let (DataPlan::Files { dataset, .. }, Split::Train) = (data, split) {
        let hw = Manifest::named(dataset).map_err(|e| coded(USAGE, e))?.image_hw;
        if fits_in_cache(opened.len(), hw) {
            return Ok(Arc::new(DecodedCache::new(opened, None, CACHE_BYTES)));
        }
    }
    Ok(opened)
}

/// Whether the publishers keep the labels of `split` to themselves, so that nothing can be scored on it.
pub(crate) fn labels_withheld(data: &DataPlan, split: Split) -> Result<bool> {
    let DataPlan::Files { dataset, .. } = data else { return Ok(false) };
    let manifest = Manifest::named(dataset).map_err(|e| coded(USAGE, e))?;
    Ok(manifest.splits.get(&split).is_some_and(|s| s.labels_withheld))
}

/// One split that must be there and have labels to score against.
pub(crate) fn need_labelled_split(data: &DataPlan, split: Split) -> Result<Arc<dyn Dataset>> {
    if labels_withheld(data, split)? {
        return Err(usage!(
            "labels of split {split} are withheld by the publishers of the data set: nothing can be scored on it here\n  hint: evaluate on val, or send what `predict` writes to the benchmark's server"
        ));
    }
    need_split(data, split)
}

#[cfg(test)]
mod tests {
    use segdistill_data::preview::{write_label_png, write_png};
    use segdistill_data::{CamVid, LabelMap, RgbImage};

    use super::*;

    #[test]
    fn a_device_that_was_named_is_never_replaced() {
        let named = |device: &str| DeviceArgs { device: Some(device.into()), tf32: false };
        assert_eq!(device_name(&named("cuda:7")), "cuda:7");
        assert!(device("cpu", false).unwrap().is_cpu());
        let refused = |name: &str, tf32| {
            let error = device(name, tf32).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), crate::exit::USAGE);
            format!("{error:#}")
        };
        assert!(refused("cpu", true).contains("--tf32"));
        assert!(refused("gpu", false).contains("expected cpu or cuda:N"));
        // No machine has a thousand: refused whether CUDA is there or not, and never run on the CPU instead.
        assert!(refused("cuda:999", false).contains("device cuda:999"));
        if n_cuda_devices().is_err() {
            assert_eq!(device_name(&DeviceArgs::default()), "cpu");
        }
    }

    #[test]
    fn a_train_split_is_kept_whole_or_not_at_all() {
        assert!(fits_in_cache(367, [360, 480]), "CamVid");
        assert!(!fits_in_cache(2975, [1024, 2048]), "Cityscapes");
        assert!(fits_in_cache(64, [1024, 2048]) && !fits_in_cache(65, [1024, 2048]));
        assert!(!fits_in_cache(usize::MAX, [2, 2]));
    }

    #[test]
    fn camvid_train_is_read_once_and_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for split in ["train", "val"] {
            let mut list = String::new();
            for (name, value) in [("a", 3), ("b", 7)].map(|(n, v)| (format!("{split}-{n}.png"), v)) {
                fs_err::create_dir_all(root.join(format!("{split}annot"))).unwrap();
                fs_err::create_dir_all(root.join(split)).unwrap();
                write_png(&root.join(split).join(&name), &RgbImage::filled(4, 6, [value; 3])).unwrap();
                write_label_png(&root.join(format!("{split}annot")).join(&name), &LabelMap::filled(4, 6, value))
                    .unwrap();
                list += &format!("{split}/{name} {split}annot/{name}\n");
            }
            fs_err::write(root.join(format!("{split}.txt")), list).unwrap();
        }
        let plan = DataPlan::Files { dataset: "camvid".into(), root: root.to_path_buf() };
        let plain = CamVid::open(root, Split::Train).unwrap();
        let [train, val] = [Split::Train, Split::Val].map(|split| need_split(&plan, split).unwrap());
        assert_eq!((train.len(), train.id(), train.split()), (2, "camvid", Split::Train));
        assert_eq!(train.classes(), plain.classes());
        let expected: Vec<_> = (0..2).map(|i| (plain.sample_name(i), plain.sample(i).unwrap())).collect();
        let seen = |d: &dyn Dataset| (0..2).map(|i| (d.sample_name(i), d.sample(i).unwrap())).collect::<Vec<_>>();
        assert_eq!(seen(train.as_ref()), expected);
        val.sample(0).unwrap();
        for folder in ["train", "trainannot", "val", "valannot"] {
            fs_err::remove_dir_all(root.join(folder)).unwrap();
        }
        assert_eq!(seen(train.as_ref()), expected, "kept in memory");
        assert!(train.sample(2).is_err() && val.sample(0).is_err() && plain.sample(0).is_err());
    }
}
