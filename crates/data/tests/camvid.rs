//! Reading pairs: list files, label formats, damaged files, and the real CamVid where it is at hand.

mod fixture;

use std::path::Path;

use fixture::{HW, image, labels, manifest, real_camvid, write_raw_png};
use png::{BitDepth, ColorType};
use segdistill_data::preview::{read_image, read_labels, write_label_png, write_png};
use segdistill_data::stats::Stats;
use segdistill_data::{CamVid, DataError, Dataset, LabelMap, LabelledFiles, Manifest, RgbImage, Split, VOID};

/// A fresh copy of the small data set, changed by `change`, and the error of opening train or reading its first sample.
fn error_after(change: impl Fn(&Path)) -> DataError {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    change(dir.path());
    CamVid::open(dir.path(), Split::Train).and_then(|data| data.sample(0)).unwrap_err()
}

fn assert_names(error: &DataError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts.iter().chain(&["hint:"]) {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn foreign_lists_are_mapped_and_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("camvid");
    fs_err::create_dir_all(&folder).unwrap();
    fixture::write(&folder);
    // The root may be the folder or hold it.
    for root in [dir.path(), &folder] {
        let train = CamVid::open(root, Split::Train).unwrap();
        let names: Vec<String> = (0..train.len()).map(|i| train.sample_name(i)).collect();
        assert_eq!(names, ["a2", "a0", "a1"]);
        for i in 0..3 {
            let sample = train.sample(i).unwrap();
            assert_eq!((sample.image, &sample.name), (image(i), &names[i]));
            let expected: Vec<u8> = labels(i).ids.iter().map(|v| if *v == 11 { VOID } else { *v }).collect();
            assert_eq!(sample.labels.ids, expected);
        }
        assert!(matches!(train.sample(3), Err(DataError::Index { index: 3, len: 3, .. })));
        let has = Split::ALL.map(|split| LabelledFiles::has_split(&manifest(), root, split));
        assert_eq!(has, [true, true, false]);
        let absent = CamVid::open(root, Split::Test).unwrap_err();
        assert!(matches!(absent, DataError::Absent { .. }));
        assert_names(&absent, &["split test of camvid is not under", "test.txt"]);
    }
    let nowhere = dir.path().join("nowhere");
    assert_names(&CamVid::open(&nowhere, Split::Val).unwrap_err(), &["nowhere", "train.txt", "camvid"]);
    assert!(!LabelledFiles::has_split(&manifest(), &nowhere, Split::Val));
}

#[test]
fn broken_lines_are_named_by_file_and_line() {
    let rewrite = |from: &str, to: &str| {
        let (from, to) = (from.to_string(), to.to_string());
        move |root: &Path| {
            let list = root.join("train.txt");
            let text = fs_err::read_to_string(&list).unwrap();
            assert!(text.contains(&from));
            fs_err::write(&list, text.replacen(&from, &to, 1)).unwrap();
        }
    };
    let second = "/SegNet/CamVid/train/a0.png /SegNet/CamVid/trainannot/a0.png";
    let cases = [
        (second.to_string(), "/SegNet/CamVid/train/a0.png".to_string(), vec!["line 2", "1 paths"]),
        (second.into(), second.replace("trainannot", "valannot"), vec!["line 2", "folder `trainannot`"]),
        (second.into(), second.replace("train/a0.png", "train/.."), vec!["line 2", "train/.."]),
        (second.into(), second.replace("a0.png", "gone.png"), vec!["line 2", "gone.png", "not there"]),
        (second.into(), second.replace("a0.png", "a2.png"), vec!["line 2", "a2.png", "first on line 1"]),
    ];
    for (from, to, named) in cases {
        let error = error_after(rewrite(&from, &to));
        assert!(matches!(error, DataError::List { line: 2, .. }), "{error}");
        assert_names(&error, &named);
        assert_names(&error, &["train.txt"]);
    }
    let empty = error_after(|root| fs_err::write(root.join("train.txt"), "\n").unwrap());
    assert_names(&empty, &["train.txt", "no pair"]);
}

#[test]
fn a_sample_of_two_splits_is_refused() {
    let error = error_after(|root| {
        for folder in ["", "annot"] {
            fs_err::copy(root.join(format!("train{folder}/a0.png")), root.join(format!("val{folder}/a0.png"))).unwrap();
        }
        let list = root.join("val.txt");
        let text = fs_err::read_to_string(&list).unwrap() + "val/a0.png valannot/a0.png\n";
        fs_err::write(list, text).unwrap();
    });
    assert_names(&error, &["train.txt", "line 2", "`a0`", "val has too on line 3"]);
}

#[test]
fn label_values_outside_the_table_are_named_by_pixel() {
    let error = error_after(|root| {
        let mut map = labels(0);
        map.ids[3 * HW[1] + 5] = 12;
        write_label_png(&root.join("trainannot/a2.png"), &map).unwrap();
    });
    assert!(matches!(error, DataError::LabelValue { row: 3, column: 5, found: 12, .. }), "{error}");
    assert_names(&error, &["label 12 at row 3, column 5", "trainannot", "a2.png", "0..=10 or void 11"]);
    // 255 is void after loading, not in CamVid's files.
    let error = error_after(|root| {
        let mut map = labels(0);
        map.ids[0] = VOID;
        write_label_png(&root.join("trainannot/a2.png"), &map).unwrap();
    });
    assert!(matches!(error, DataError::LabelValue { row: 0, column: 0, found: 255, .. }), "{error}");
}

#[test]
fn labels_of_another_size_name_both_files_and_sizes() {
    let error = error_after(|root| {
        write_label_png(&root.join("trainannot/a2.png"), &LabelMap::filled(3, 4, 0)).unwrap();
    });
    assert_names(&error, &["trainannot", "4x3", "8x6", "train/a2.png"]);
}

#[test]
fn palette_labels_keep_raw_indices_and_other_formats_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.png");
    let values: Vec<u8> = (0..15).map(|i| i % 12).collect();
    write_raw_png(&path, [3, 5], ColorType::Indexed, BitDepth::Eight, &values);
    assert_eq!(read_labels(&path).unwrap(), LabelMap { height: 3, width: 5, ids: values.clone() });

    // The same at four bits: two pixels a byte, each row filled up to whole bytes.
    let packed: Vec<u8> =
        values.chunks(5).flat_map(|row| [row[0] << 4 | row[1], row[2] << 4 | row[3], row[4] << 4]).collect();
    write_raw_png(&path, [3, 5], ColorType::Indexed, BitDepth::Four, &packed);
    assert_eq!(read_labels(&path).unwrap().ids, values);

    let bytes = |n: usize| vec![1u8; n];
    for (color, depth, n) in [
        (ColorType::Rgb, BitDepth::Eight, 45),
        (ColorType::Rgba, BitDepth::Eight, 60),
        (ColorType::GrayscaleAlpha, BitDepth::Eight, 30),
        (ColorType::Grayscale, BitDepth::Sixteen, 30),
        (ColorType::Grayscale, BitDepth::Four, 9),
    ] {
        write_raw_png(&path, [3, 5], color, depth, &bytes(n));
        let error = read_labels(&path).unwrap_err();
        assert!(matches!(error, DataError::LabelFormat { .. }), "{color:?} {depth:?}: {error}");
        assert_names(&error, &["labels.png", &format!("{color:?}"), &format!("{} bits", depth as u8)]);
    }
}

#[test]
fn every_cut_of_a_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let (picture, map) = (dir.path().join("picture.png"), dir.path().join("map.png"));
    write_png(&picture, &image(1)).unwrap();
    write_label_png(&map, &labels(1)).unwrap();
    let whole = [&picture, &map].map(|path| fs_err::read(path).unwrap());
    for cut in 0..whole[1].len() {
        fs_err::write(&map, &whole[1][..cut]).unwrap();
        assert_names(&read_labels(&map).unwrap_err(), &["map.png"]);
    }
    // Without the empty last chunk (12 bytes) every pixel is still there, which the picture decoder accepts.
    for cut in 0..whole[0].len() - 12 {
        fs_err::write(&picture, &whole[0][..cut]).unwrap();
        assert_names(&read_image(&picture).unwrap_err(), &["picture.png"]);
    }
    // One flipped bit in the pixels is seen by the chunk's checksum.
    let mut flipped = whole[1].clone();
    let idat = flipped.windows(4).position(|w| w == b"IDAT").unwrap();
    flipped[idat + 9] ^= 4;
    fs_err::write(&map, flipped).unwrap();
    assert_names(&read_labels(&map).unwrap_err(), &["map.png"]);
    let error = read_labels(&dir.path().join("gone.png")).unwrap_err();
    assert!(matches!(error, DataError::Io(_)) && error.to_string().contains("gone.png"), "{error}");
}

#[test]
fn bombs_are_refused_from_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.png");
    write_label_png(&path, &labels(0)).unwrap();
    let small = fs_err::read(&path).unwrap();
    for (width, height) in [(60_000u32, 60_000u32), (8193, 1), (1, 8193)] {
        let mut bytes = small.clone();
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        bytes[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        fs_err::write(&path, &bytes).unwrap();
        let error = read_labels(&path).unwrap_err();
        assert_names(&error, &["bomb.png", "8192"]);
        assert!(error.to_string().contains("above the limit"), "{error}");
        assert!(matches!(read_image(&path).unwrap_err(), DataError::Image { .. }));
    }
}

/// The checksum of PNG chunks, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[test]
fn pictures_are_written_as_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.png");
    write_png(&path, &image(4)).unwrap();
    assert_eq!(read_image(&path).unwrap(), image(4));
    let wrong = RgbImage { height: 2, width: 2, rgb: vec![0; 11] };
    assert_names(&write_png(&path, &wrong).unwrap_err(), &["x.png", "11 bytes", "12"]);
}

#[test]
fn statistics_of_the_small_set_are_those_of_a_plain_count() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    let data = LabelledFiles::open(manifest(), dir.path(), Split::Val).unwrap();
    let stats = Stats::of(&data).unwrap();
    let mut pixels = [0u64; 12];
    let mut values: Vec<f64> = Vec::new();
    for i in 0..2 {
        labels(i).ids.iter().for_each(|v| pixels[usize::from(*v)] += 1);
        values.extend(image(i).rgb.chunks(3).map(|p| f64::from(p[1]) / 255.0));
    }
    assert_eq!((stats.class_pixels.as_slice(), stats.void_pixels), (&pixels[..11], pixels[11]));
    assert_eq!((stats.n_images, stats.n_pixels()), (2, 96));
    assert_eq!(stats.images_with_class, [2; 11]);
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
    assert!((stats.rgb_mean()[1] - mean).abs() < 1e-12 && (stats.rgb_std()[1] - std).abs() < 1e-9);
    // Every class holds 8 of 96 pixels, so all weigh 1.
    assert_eq!(stats.median_frequency_weights(), [1.0; 11]);
}

#[test]
fn real_train_holds_the_published_pixels() {
    let Some(root) = real_camvid("real_train_holds_the_published_pixels") else { return };
    let manifest = Manifest::named("camvid").unwrap();
    let train = CamVid::open(&root, Split::Train).unwrap();
    assert_eq!((train.len(), CamVid::open(&root, Split::Val).unwrap().len()), (367, 101));
    let stats = Stats::of(&train).unwrap();
    assert_eq!(Some(&stats.class_pixels), manifest.train_pixels.as_ref());
    assert_eq!(Some(stats.void_pixels), manifest.train_void_pixels);
    // METHODS 7.1, each printed to the digits compared here.
    for (found, expected) in [(stats.rgb_mean(), [0.4119, 0.4251, 0.4327]), (stats.rgb_std(), [0.3071, 0.3116, 0.3072])]
    {
        for c in 0..3 {
            assert!((found[c] - expected[c]).abs() < 6e-5, "{found:?}");
        }
    }
    let weights = stats.median_frequency_weights();
    let published = [0.279, 0.202, 4.787, 0.149, 1.000, 0.422, 3.847, 1.974, 0.789, 6.375, 8.859];
    for (class, (found, expected)) in weights.iter().zip(published).enumerate() {
        assert!((found - expected).abs() < 6e-4, "class {class}: {found}, expected {expected}");
    }
}
