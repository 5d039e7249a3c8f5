//! Scores equal torchmetrics' for the same maps; the constants come from `fixtures/make_confusion.py`.

use segdistill_eval::Confusion;

const VOID: u8 = 255;

/// Labels and predictions by the formula of the script.
fn maps(n_used: u64, n_pixels: usize, mut state: u64) -> (Vec<u8>, Vec<u8>) {
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 40
    };
    let (mut labels, mut predictions) = (Vec::new(), Vec::new());
    for _ in 0..n_pixels {
        let label = (draw() % n_used) as u8;
        predictions.push(if draw() % 10 < 6 { label } else { (draw() % n_used) as u8 });
        labels.push(if draw() % 8 == 0 { VOID } else { label });
    }
    (labels, predictions)
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "found {found}, torchmetrics (f32, 7 digits) {expected}");
}

#[test]
fn five_classes_all_present() {
    let (labels, predictions) = maps(5, 400, 1);
    let mut confusion = Confusion::new(5);
    confusion.add(&labels, &predictions, VOID).unwrap();
    let expected: [u64; 25] = [52, 9, 6, 5, 7, 7, 47, 2, 6, 5, 7, 4, 43, 4, 2, 2, 4, 8, 59, 10, 3, 6, 3, 5, 44];
    assert_eq!(confusion.counts(), expected);
    let scores = confusion.scores();
    let iou = [0.5306122, 0.5222222, 0.5443038, 0.5728155, 0.5176471];
    scores.iou.iter().zip(iou).for_each(|(found, expected)| close(found.unwrap(), expected));
    close(scores.miou, 0.5375202);
    close(scores.fw_iou, 0.5391018);
    close(scores.pixel_accuracy, 0.7);
    close(scores.mean_accuracy, 0.7017084);
}

#[test]
fn eleven_classes_two_absent() {
    let (labels, predictions) = maps(9, 3000, 2);
    let mut confusion = Confusion::new(11);
    confusion.add(&labels, &predictions, VOID).unwrap();
    assert_eq!(confusion.counts()[..11], [201, 17, 11, 8, 9, 22, 14, 12, 3, 0, 0]);
    let scores = confusion.scores();
    let iou = [0.5075758, 0.4311688, 0.4880383, 0.4736842, 0.5, 0.4635294, 0.4784946, 0.4987013, 0.5056818];
    scores.iou[..9].iter().zip(iou).for_each(|(found, expected)| close(found.unwrap(), expected));
    // torchmetrics prints 0 for an absent class and leaves it out of the mean; here it is `None`.
    assert_eq!(scores.iou[9..], [None, None]);
    assert_eq!(scores.n_classes_present, 9);
    close(scores.miou, 0.4829860);
    close(scores.fw_iou, 0.4832404);
    close(scores.pixel_accuracy, 0.6510015);
    close(scores.mean_accuracy, 0.6507487);
}
