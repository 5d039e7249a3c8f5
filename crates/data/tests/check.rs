//! The data check: what it lists for each kind of damage, and that a whole copy passes.

mod fixture;

use std::path::Path;

use fixture::{manifest, real_camvid};
use segdistill_data::check::{Problem, SplitStatus, check};
use segdistill_data::preview::{write_label_png, write_png};
use segdistill_data::{LabelMap, Manifest, RgbImage, Split};

/// Problems of train after a change to a whole copy.
fn problems_after(change: impl Fn(&Path)) -> Vec<Problem> {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    change(dir.path());
    let report = check(dir.path(), &manifest(), &[Split::Train]);
    assert!(!report.is_ok(), "{report:?}");
    report.splits[0].problems.clone()
}

fn assert_one(problems: &[Problem], file: &str, place: &str, found: &str, expected: &str) {
    assert_eq!(problems.len(), 1, "{problems:#?}");
    let p = &problems[0];
    for (text, part) in [(&p.file, file), (&p.place, place), (&p.found, found), (&p.expected, expected)] {
        assert!(text.contains(part), "`{part}` is not in `{text}` of {p:#?}");
    }
    assert!(!p.hint.is_empty() && p.to_string().contains("hint: "));
}

#[test]
fn a_whole_copy_passes_and_an_absent_split_is_said_to_be_absent() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    let report = check(dir.path(), &manifest(), &Split::ALL);
    assert!(report.is_ok(), "{report:?}");
    let seen: Vec<_> = report.splits.iter().map(|s| (s.split, s.status, s.n_images)).collect();
    let present = SplitStatus::Present;
    assert_eq!(seen, [(Split::Train, present, 3), (Split::Val, present, 2), (Split::Test, SplitStatus::Absent, 0)]);
    // Nothing at all is not a pass.
    let nothing = check(&dir.path().join("nowhere"), &manifest(), &Split::ALL);
    assert!(!nothing.is_ok());
    assert!(nothing.splits[0].problems[0].file.contains("nowhere"));
}

#[test]
fn each_damage_names_file_place_and_value() {
    let label = |root: &Path| root.join("trainannot/a0.png");
    assert_one(
        &problems_after(|root| write_label_png(&label(root), &LabelMap::filled(3, 4, 0)).unwrap()),
        "a0.png",
        "whole picture",
        "4x3",
        "8x6",
    );
    let twelve = |root: &Path| {
        let mut map = fixture::labels(1);
        map.ids[2 * 8 + 7] = 12;
        write_label_png(&label(root), &map).unwrap();
    };
    assert_one(&problems_after(twelve), "trainannot", "row 2, column 7", "label 12", "0..=10 or void 11");
    assert_one(
        &problems_after(|root| fs_err::remove_file(label(root)).unwrap()),
        "train.txt",
        "line 2",
        "a0.png",
        "a file",
    );
    let cut = |root: &Path| {
        let bytes = fs_err::read(label(root)).unwrap();
        fs_err::write(label(root), &bytes[..bytes.len() / 2]).unwrap();
    };
    assert_one(&problems_after(cut), "a0.png", "whole file", "", "can be decoded");
    assert_one(
        &problems_after(|root| write_png(&label(root), &fixture::image(0)).unwrap()),
        "a0.png",
        "whole file",
        "Rgb pixels of 8 bits",
        "8-bit single-channel",
    );
    let resized = |root: &Path| {
        write_png(&root.join("train/a0.png"), &RgbImage::filled(4, 4, [1; 3])).unwrap();
        write_label_png(&label(root), &LabelMap::filled(4, 4, 0)).unwrap();
    };
    assert_one(&problems_after(resized), "train/a0.png", "whole picture", "4x4", "8x6");
    let short = |root: &Path| {
        let list = root.join("train.txt");
        let text = fs_err::read_to_string(&list).unwrap();
        fs_err::write(&list, text.lines().next().unwrap()).unwrap();
    };
    assert_one(&problems_after(short), "train.txt", "whole list", "1 pairs", "3");
}

#[test]
fn a_sample_in_train_and_val_is_a_problem_of_both() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    for folder in ["", "annot"] {
        let name = |split: &str| dir.path().join(format!("{split}{folder}/a1.png"));
        fs_err::copy(name("train"), name("val")).unwrap();
    }
    fs_err::write(dir.path().join("val.txt"), "val/a1.png valannot/a1.png\nval/b1.png valannot/b1.png\n").unwrap();
    // Also when only one of them is asked for, and of both when both are.
    for splits in [&[Split::Val][..], &[Split::Train], &[Split::Train, Split::Val]] {
        let report = check(dir.path(), &manifest(), splits);
        assert!(!report.is_ok(), "{splits:?}");
        for found in &report.splits {
            let (list, line, other) = match found.split {
                Split::Train => ("train.txt", "line 3", "`a1`, which val has too"),
                _ => ("val.txt", "line 1", "`a1`, which train has too"),
            };
            assert_one(&found.problems, list, line, other, "one split");
        }
    }
}

#[test]
fn a_list_that_cannot_be_read_is_named_with_the_reason() {
    let latin1 = |root: &Path| {
        let list = root.join("train.txt");
        let mut bytes = fs_err::read(&list).unwrap();
        bytes.extend(b"train/\xe4.png trainannot/\xe4.png\n");
        fs_err::write(list, bytes).unwrap();
    };
    let problems = problems_after(latin1);
    assert_one(&problems, "train.txt", "line 4", "bytes that are not UTF-8", "text");
    assert_eq!(problems[0].to_string().matches("hint:").count(), 1);
    // A file that may be opened and never read, by root neither.
    #[cfg(target_os = "linux")]
    {
        let unreadable = |root: &Path| {
            fs_err::remove_file(root.join("train.txt")).unwrap();
            std::os::unix::fs::symlink("/proc/self/mem", root.join("train.txt")).unwrap();
        };
        let problems = problems_after(unreadable);
        assert_one(&problems, "train.txt", "whole file", "os error 5", "a file that can be read");
        assert!(!problems[0].found.contains("hint") && !problems[0].found.contains("train.txt"), "{problems:?}");
        assert_eq!(problems[0].to_string().matches("hint:").count(), 1);
    }
}

#[test]
fn a_label_of_another_kind_and_size_is_told_both() {
    let colours = RgbImage::filled(3, 4, [9; 3]);
    let problems = problems_after(|root| write_png(&root.join("trainannot/a0.png"), &colours).unwrap());
    let found = "Rgb pixels of 8 bits, 4x3 (width x height), with an image of 8x6 (width x height)";
    assert_one(&problems, "trainannot/a0.png", "whole file", found, "8-bit single-channel");
    // One of the right size has the one fault.
    let problems = problems_after(|root| write_png(&root.join("trainannot/a0.png"), &fixture::image(0)).unwrap());
    assert_eq!(problems[0].found, "Rgb pixels of 8 bits, 8x6 (width x height)");
}

#[test]
fn all_problems_are_listed() {
    let problems = problems_after(|root| {
        for name in ["a0", "a1", "a2"] {
            write_label_png(&root.join(format!("trainannot/{name}.png")), &LabelMap::filled(6, 8, 77)).unwrap();
        }
    });
    assert_eq!(problems.len(), 3);
    assert!(problems.iter().all(|p| p.found == "label 77" && p.place == "row 0, column 0"));
}

#[test]
fn drawn_scenes_pass() {
    let report = check(Path::new("unused"), &Manifest::named("street-scenes").unwrap(), &Split::ALL);
    assert!(report.is_ok(), "{report:?}");
    assert_eq!(report.splits.iter().map(|s| s.n_images).collect::<Vec<_>>(), [512, 128, 128]);
}

#[test]
fn the_real_copy_passes() {
    let Some(root) = real_camvid("the_real_copy_passes") else { return };
    let manifest = Manifest::named("camvid").unwrap();
    // Val only: train is read whole by the count of its pixels.
    let report = check(&root, &manifest, &[Split::Val]);
    assert!(report.is_ok(), "{report:?}");
    assert_eq!(report.splits[0].n_images, 101);
}
