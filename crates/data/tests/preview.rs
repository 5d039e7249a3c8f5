//! Overlay sheets: every cell stands where it should, in the right colours.

use segdistill_data::preview::{overlay, sheet};
use segdistill_data::{LabelMap, Manifest, RgbImage, Sample, VOID};

fn sample(color: [u8; 3], id: u8) -> Sample {
    let image = RgbImage::filled(5, 7, color);
    Sample { image, labels: LabelMap::filled(5, 7, id), name: "s".into() }
}

#[test]
fn cells_are_input_labels_and_overlay() {
    let table = Manifest::named("camvid").unwrap().classes;
    let samples = [sample([10, 20, 30], 3), sample([40, 50, 60], VOID), sample([70, 80, 90], 0)];
    let out = sheet(&samples, &table, 2).unwrap();
    // Two rows of six cells, 4 pixels around each.
    assert_eq!(out.hw(), [2 * 9 + 4, 6 * 11 + 4]);
    let cell = |row: usize, column: usize| out.at(4 + row * 9 + 2, 4 + column * 11 + 3);
    assert_eq!((cell(0, 0), cell(0, 1)), ([10, 20, 30], [128, 64, 128]));
    // 0.55 of the class colour and 0.45 of the picture.
    assert_eq!(cell(0, 2), [75, 44, 84]);
    assert_eq!((cell(0, 3), cell(0, 4), cell(0, 5)), ([40, 50, 60], [0, 0, 0], [40, 50, 60]));
    assert_eq!((cell(1, 0), cell(1, 3)), ([70, 80, 90], [255; 3]));
    assert_eq!(out.at(0, 0), [255; 3]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let table = Manifest::named("camvid").unwrap().classes;
    assert!(sheet(&[], &table, 2).is_err() && sheet(&[sample([0; 3], 0)], &table, 0).is_err());
    let error = overlay(&RgbImage::filled(2, 2, [0; 3]), &LabelMap::filled(2, 3, 0), &table, 0.5).unwrap_err();
    assert!(error.to_string().contains("[2, 3]"), "{error}");
}
