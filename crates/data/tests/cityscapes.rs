//! Cityscapes: a small tree of two cities made here, read and checked; every label id, and every way a file goes astray.

use std::path::{Path, PathBuf};

use segdistill_data::check::{CheckReport, SplitStatus, check};
use segdistill_data::preview::{write_label_png, write_png};
use segdistill_data::transform::{SampleKey, TrainTransform};
use segdistill_data::{
    Cityscapes, DataError, Dataset, LabelMap, LabelledFiles, Manifest, RgbImage, Sample, Split, VOID,
};

const HW: [usize; 2] = [4, 8];

/// Samples of each split, in the order they are read.
const TREE: [(&str, &[&str]); 3] = [
    ("train", &["aachen_000000_000019", "aachen_000001_000019", "zurich_000000_000019"]),
    ("val", &["frankfurt_000000_000294"]),
    ("test", &["berlin_000000_000019"]),
];

fn path(root: &Path, split: &str, name: &str, kind: [&str; 2]) -> PathBuf {
    let city = name.split('_').next().unwrap();
    root.join(kind[0]).join(split).join(city).join(format!("{name}{}", kind[1]))
}

const IMAGE: [&str; 2] = ["leftImg8bit", "_leftImg8bit.png"];
const LABEL: [&str; 2] = ["gtFine", "_gtFine_labelIds.png"];

fn write_pair(root: &Path, split: &str, name: &str, k: usize) {
    let [height, width] = HW;
    for kind in [IMAGE, LABEL] {
        fs_err::create_dir_all(path(root, split, name, kind).parent().unwrap()).unwrap();
    }
    let rgb = (0..height * width * 3).map(|i| (i * 3 + k) as u8).collect();
    write_png(&path(root, split, name, IMAGE), &RgbImage { height, width, rgb }).unwrap();
    // Test holds what its published label files hold: 0 to 6, all void.
    let label = |i: usize| if split == "test" { i % 7 } else { (i + k * 32) % 34 };
    let ids = (0..height * width).map(|i| label(i) as u8).collect();
    write_label_png(&path(root, split, name, LABEL), &LabelMap { height, width, ids }).unwrap();
}

/// The whole tree; later cities are written first, so that the order of a folder is not the order of names.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (split, names) in TREE {
        for (k, name) in names.iter().enumerate().rev() {
            write_pair(dir.path(), split, name, k);
        }
    }
    dir
}

/// The manifest with the tree's size and counts.
fn manifest() -> Manifest {
    let mut manifest = Manifest::named("cityscapes").unwrap();
    manifest.image_hw = HW;
    for (split, names) in TREE {
        manifest.splits.get_mut(&split.parse::<Split>().unwrap()).unwrap().count = names.len();
    }
    manifest
}

fn names(data: &LabelledFiles) -> Vec<String> {
    (0..data.len()).map(|i| data.sample_name(i)).collect()
}

/// A label file of one sample of train.
fn label_of(root: &Path, k: usize) -> PathBuf {
    path(root, "train", TREE[0].1[k], LABEL)
}

/// After a change to the whole tree: the error of opening train or reading all of it, and the check of every split.
fn after(change: impl Fn(&Path)) -> (DataError, CheckReport) {
    let dir = tree();
    change(dir.path());
    let read = |data: LabelledFiles| (0..data.len()).try_for_each(|i| data.sample(i).map(drop));
    let error = Cityscapes::open(dir.path(), Split::Train).and_then(read).unwrap_err();
    (error, check(dir.path(), &manifest(), &Split::ALL))
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn the_tree_is_read_in_order_of_names_whatever_else_lies_there() {
    let dir = tree();
    let root = dir.path();
    // What the archives hold besides, what csCreateTrainIdLabelImgs makes, and what file managers leave.
    for (name, kind) in [
        ("aachen_000000_000019", ["gtFine", "_gtFine_labelTrainIds.png"]),
        ("aachen_000000_000019", ["gtFine", "_gtFine_instanceIds.png"]),
        ("aachen_000000_000019", ["gtFine", "_gtFine_color.png"]),
        ("aachen_000000_000019", ["gtFine", "_gtFine_polygons.json"]),
    ] {
        fs_err::write(path(root, "train", name, kind), "not looked at").unwrap();
    }
    let aachen = root.join("leftImg8bit/train/aachen");
    for name in ["._aachen_000000_000019_leftImg8bit.png", "Thumbs.db", "_leftImg8bit.png"] {
        fs_err::write(aachen.join(name), "not looked at").unwrap();
    }
    fs_err::write(root.join("leftImg8bit/train/readme.txt"), "not looked at").unwrap();
    fs_err::create_dir_all(root.join("leftImg8bit/train/.cache")).unwrap();
    fs_err::write(root.join("leftImg8bit/train/.cache/a_leftImg8bit.png"), "not looked at").unwrap();
    #[cfg(unix)]
    {
        let link = |from: PathBuf, to: PathBuf| std::os::unix::fs::symlink(from, to).unwrap();
        let one = aachen.join("aachen_000000_000019_leftImg8bit.png");
        link(one, aachen.join("twin_000000_000019_leftImg8bit.png"));
        link(aachen, root.join("leftImg8bit/train/again"));
    }
    for (split, expected) in TREE {
        let data = Cityscapes::open(root, split.parse().unwrap()).unwrap();
        assert_eq!(names(&data), expected);
        assert_eq!((data.id(), data.classes().n_classes()), ("cityscapes", 19));
    }
    let report = check(root, &manifest(), &Split::ALL);
    assert!(report.is_ok(), "{report:#?}");
    // The root may hold the folder under its name, and a split may be absent.
    let above = tempfile::tempdir().unwrap();
    fs_err::rename(root, above.path().join("cityscapes")).unwrap();
    for folder in ["leftImg8bit/test", "gtFine/test"] {
        fs_err::remove_dir_all(above.path().join("cityscapes").join(folder)).unwrap();
    }
    assert_eq!(names(&Cityscapes::open(above.path(), Split::Train).unwrap()), TREE[0].1);
    let has = Split::ALL.map(|split| LabelledFiles::has_split(&manifest(), above.path(), split));
    assert_eq!(has, [true, true, false]);
    let absent = Cityscapes::open(above.path(), Split::Test).unwrap_err();
    assert!(matches!(absent, DataError::Absent { .. }), "{absent}");
    assert_says(&absent.to_string(), &["split test of cityscapes", "leftImg8bit/test", "gtFine_trainvaltest.zip"]);
}

#[test]
fn label_ids_become_train_ids_and_the_others_void() {
    let dir = tree();
    let name = TREE[1].1[0];
    let expected: [(u8, u8); 20] = [
        (7, 0),
        (8, 1),
        (11, 2),
        (12, 3),
        (13, 4),
        (17, 5),
        (19, 6),
        (20, 7),
        (21, 8),
        (22, 9),
        (23, 10),
        (24, 11),
        (25, 12),
        (26, 13),
        (27, 14),
        (28, 15),
        (31, 16),
        (32, 17),
        (33, 18),
        (VOID, VOID),
    ];
    let ids: Vec<u8> = (0..34).chain([VOID]).collect();
    let width = ids.len();
    write_png(&path(dir.path(), "val", name, IMAGE), &RgbImage::filled(1, width, [0; 3])).unwrap();
    let labels = LabelMap { height: 1, width, ids: ids.clone() };
    write_label_png(&path(dir.path(), "val", name, LABEL), &labels).unwrap();
    let read = Cityscapes::open(dir.path(), Split::Val).unwrap().sample(0).unwrap().labels.ids;
    for (label, id) in ids.iter().zip(read) {
        let class = expected.iter().find(|(of, _)| of == label).map_or(VOID, |(_, class)| *class);
        assert_eq!(id, class, "label id {label}");
    }
}

#[test]
fn a_label_id_that_nobody_knows_is_refused_with_its_place() {
    for value in 34..VOID {
        let mut labels = LabelMap::filled(HW[0], HW[1], 7);
        labels.ids[2 * HW[1] + 5] = value;
        let error = manifest().ids_from_labels(labels, Path::new("x_gtFine_labelIds.png")).unwrap_err();
        assert!(matches!(error, DataError::LabelValue { row: 2, column: 5, found, .. } if found == value), "{error}");
    }
    let (error, report) = after(|root| {
        let mut labels = LabelMap::filled(HW[0], HW[1], 7);
        labels.ids[HW[1] + 3] = 34;
        write_label_png(&label_of(root, 1), &labels).unwrap();
    });
    assert_says(
        &error.to_string(),
        &["label 34 at row 1, column 3", "aachen_000001_000019_gtFine_labelIds.png", "hint:"],
    );
    let problems = &report.splits[0].problems;
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert_says(&problems[0].to_string(), &["aachen_000001_000019_gtFine_labelIds.png", "row 1, column 3", "label 34"]);
}

#[test]
fn files_without_their_partner_are_named() {
    let (error, report) = after(|root| fs_err::remove_file(label_of(root, 2)).unwrap());
    let said = ["zurich_000000_000019_leftImg8bit.png", "no label file `", "zurich_000000_000019_gtFine_labelIds.png"];
    assert!(matches!(error, DataError::Pair { .. }), "{error}");
    assert_says(&error.to_string(), &said);
    assert_eq!((report.splits[0].n_images, report.splits[0].problems.len()), (3, 1));
    assert_says(&report.splits[0].problems[0].to_string(), &said);

    let (error, report) = after(|root| fs_err::remove_file(path(root, "train", TREE[0].1[0], IMAGE)).unwrap());
    let said = ["aachen_000000_000019_gtFine_labelIds.png", "no image `", "aachen_000000_000019_leftImg8bit.png"];
    assert_says(&error.to_string(), &said);
    // The partner that is missing, and the count that it leaves.
    assert_eq!(report.splits[0].problems.len(), 2, "{report:#?}");
    assert_says(&report.splits[0].problems[0].to_string(), &said);
    assert_says(&report.splits[0].problems[1].to_string(), &["leftImg8bit/train", "2 pairs", "3, as published"]);

    // The archive of the labels was never unpacked: one problem a split, not one an image.
    let (error, report) = after(|root| fs_err::remove_dir_all(root.join("gtFine")).unwrap());
    assert_says(&error.to_string(), &["gtFine/train", "no such folder", "unpack both"]);
    for split in &report.splits {
        assert_eq!((split.status, split.problems.len()), (SplitStatus::Present, 1), "{split:#?}");
    }
    let (error, _) = after(|root| {
        for kind in [IMAGE, LABEL] {
            fs_err::remove_dir_all(root.join(kind[0]).join("train")).unwrap();
            fs_err::create_dir_all(root.join(kind[0]).join("train")).unwrap();
        }
    });
    assert_says(&error.to_string(), &["leftImg8bit/train", "no image", "_leftImg8bit.png", "one folder a city"]);
}

#[test]
fn a_sample_is_in_one_place_only() {
    let (error, report) = after(|root| {
        for kind in [IMAGE, LABEL] {
            let there = path(root, "val", TREE[0].1[1], kind);
            fs_err::create_dir_all(there.parent().unwrap()).unwrap();
            fs_err::copy(path(root, "train", TREE[0].1[1], kind), there).unwrap();
        }
    });
    assert_says(&error.to_string(), &["train/aachen/aachen_000001_000019", "which val has too", "val/aachen"]);
    let of = |k: usize| report.splits[k].problems.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!((of(0).len(), of(1).len()), (1, 2), "{report:#?}");
    assert_says(&of(0)[0], &["aachen_000001_000019", "which val has too"]);
    assert!(of(1).iter().any(|p| p.contains("which train has too")), "{:?}", of(1));

    let (error, _) = after(|root| {
        for kind in [IMAGE, LABEL] {
            let from = path(root, "train", TREE[0].1[1], kind);
            let there = root.join(kind[0]).join("train/zurich").join(from.file_name().unwrap());
            fs_err::copy(from, there).unwrap();
        }
    });
    assert_says(&error.to_string(), &["train/zurich/aachen_000001_000019", "again, first in", "train/aachen"]);
}

#[test]
fn a_root_without_the_data_says_how_to_obtain_it() {
    let dir = tempfile::tempdir().unwrap();
    for root in [dir.path().to_path_buf(), dir.path().join("nowhere")] {
        let error = Cityscapes::open(&root, Split::Train).unwrap_err();
        assert!(matches!(error, DataError::Absent { .. }), "{error}");
        assert_says(
            &error.to_string(),
            &["cityscapes is not under", "leftImg8bit/train", "register", "leftImg8bit_trainvaltest.zip"],
        );
        assert!(!check(&root, &manifest(), &Split::ALL).is_ok());
    }
}

#[test]
fn pictures_of_another_size_are_found_by_the_check() {
    let dir = tree();
    let name = TREE[0].1[0];
    write_png(&path(dir.path(), "train", name, IMAGE), &RgbImage::filled(2, 4, [0; 3])).unwrap();
    write_label_png(&path(dir.path(), "train", name, LABEL), &LabelMap::filled(2, 4, 7)).unwrap();
    let report = check(dir.path(), &manifest(), &[Split::Train]);
    assert_eq!(report.splits[0].problems.len(), 1, "{report:#?}");
    assert_says(&report.splits[0].problems[0].to_string(), &["aachen_000000_000019", "4x2", "8x4"]);
    write_label_png(&path(dir.path(), "train", name, LABEL), &LabelMap::filled(4, 8, 7)).unwrap();
    let report = check(dir.path(), &manifest(), &[Split::Train]);
    assert_says(&report.splits[0].problems[0].to_string(), &["aachen_000000_000019_gtFine_labelIds.png", "8x4", "4x2"]);
}

#[test]
fn test_is_known_to_be_unlabelled_and_train_must_not_be() {
    let dir = tree();
    let report = check(dir.path(), &manifest(), &Split::ALL);
    assert!(report.is_ok(), "{report:#?}");
    assert_eq!(report.splits.iter().map(|s| s.n_unlabelled).collect::<Vec<_>>(), [0, 0, 1]);
    write_label_png(&path(dir.path(), "val", TREE[1].1[0], LABEL), &LabelMap::filled(HW[0], HW[1], 3)).unwrap();
    let report = check(dir.path(), &manifest(), &[Split::Val]);
    assert_says(&report.splits[0].problems[0].to_string(), &["leftImg8bit/val", "no pixel of any class"]);
}

#[test]
fn published_sizes_are_cropped_as_the_recipe_asks() {
    let [height, width] = Manifest::named("cityscapes").unwrap().image_hw;
    let sample = Sample {
        image: RgbImage::filled(height, width, [90, 120, 30]),
        labels: LabelMap::filled(height, width, 13),
        name: "aachen_000000_000019".into(),
    };
    let transform = TrainTransform { scale: [0.5, 2.0], flip: 0.5, ..TrainTransform::plain([512, 1024]) };
    for index in 0..3 {
        let cropped = transform.apply(&sample, SampleKey { seed: 0, epoch: 0, index }).unwrap();
        assert_eq!((cropped.image.hw(), cropped.labels.hw()), ([512, 1024], [512, 1024]));
        // The smallest scale still fills the crop: nothing is padded.
        assert!(cropped.labels.ids.iter().all(|id| *id == 13));
    }
}
