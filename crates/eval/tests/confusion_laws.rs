//! Laws of the confusion matrix: order, grouping and naming of classes change nothing.

use segdistill_eval::{Confusion, Scores};
use segdistill_ops::rng::Stream;

const VOID: u8 = 255;

struct Case {
    n_classes: usize,
    labels: Vec<u8>,
    predictions: Vec<u8>,
}

/// Maps of random size; the last class is left out now and then, so that absent classes are met.
fn case(seed: u64) -> Case {
    let mut s = Stream::new(seed, "confusion-laws", &[]);
    let n_classes = 2 + s.below(12) as usize;
    let n_used = n_classes as u64 - s.below(2);
    let n = 1 + s.below(500) as usize;
    let labels = (0..n).map(|_| if s.chance(0.1) { VOID } else { s.below(n_used) as u8 }).collect();
    let predictions = (0..n).map(|_| s.below(n_used) as u8).collect();
    Case { n_classes, labels, predictions }
}

fn whole(case: &Case) -> Confusion {
    let mut confusion = Confusion::new(case.n_classes);
    confusion.add(&case.labels, &case.predictions, VOID).unwrap();
    confusion
}

fn same(a: &Scores, b: &Scores) -> bool {
    // Through JSON, where NaN is null and so equals itself.
    serde_json::to_string(a).unwrap() == serde_json::to_string(b).unwrap()
}

/// Counts and scores by the definition, class by class over the pixels.
fn naive_iou(case: &Case, class: u8) -> Option<f64> {
    let valid = || case.labels.iter().zip(&case.predictions).filter(|(l, _)| **l != VOID);
    let both = valid().filter(|(l, p)| **l == class && **p == class).count();
    let either = valid().filter(|(l, p)| **l == class || **p == class).count();
    (either > 0).then(|| both as f64 / either as f64)
}

#[test]
fn scores_equal_the_definition() {
    let mut absent = 0;
    for seed in 0..60 {
        let case = case(seed);
        let scores = whole(&case).scores();
        let naive: Vec<Option<f64>> = (0..case.n_classes).map(|c| naive_iou(&case, c as u8)).collect();
        assert_eq!(scores.iou, naive);
        let present: Vec<f64> = naive.iter().flatten().copied().collect();
        assert_eq!(scores.n_classes_present, present.len());
        absent += case.n_classes - present.len();
        if !present.is_empty() {
            assert!((scores.miou - present.iter().sum::<f64>() / present.len() as f64).abs() < 1e-12);
        }
    }
    assert!(absent > 5, "the cases must meet absent classes, met {absent}");
}

#[test]
fn the_order_of_pixels_changes_nothing() {
    for seed in 0..40 {
        let case = case(seed);
        let mut order: Vec<usize> = (0..case.labels.len()).collect();
        Stream::new(seed, "order", &[]).shuffle(&mut order);
        let shuffled = Case {
            n_classes: case.n_classes,
            labels: order.iter().map(|&i| case.labels[i]).collect(),
            predictions: order.iter().map(|&i| case.predictions[i]).collect(),
        };
        assert_eq!(whole(&case), whole(&shuffled));
    }
}

#[test]
fn splitting_and_merging_in_any_order_changes_nothing() {
    for seed in 0..40 {
        let case = case(seed);
        let mut s = Stream::new(seed, "split", &[]);
        let mut parts: Vec<Confusion> = (0..1 + s.below(5)).map(|_| Confusion::new(case.n_classes)).collect();
        for (l, p) in case.labels.iter().zip(&case.predictions) {
            let part = s.below(parts.len() as u64) as usize;
            parts[part].add(&[*l], &[*p], VOID).unwrap();
        }
        s.shuffle(&mut parts);
        let mut total = Confusion::new(case.n_classes);
        parts.iter().for_each(|part| total.merge(part).unwrap());
        assert_eq!(total, whole(&case));
        assert!(same(&total.scores(), &whole(&case).scores()));
    }
}

#[test]
fn renaming_classes_renames_the_scores() {
    for seed in 0..40 {
        let case = case(seed);
        let mut names: Vec<u8> = (0..case.n_classes as u8).collect();
        Stream::new(seed, "names", &[]).shuffle(&mut names);
        let rename = |v: &u8| if *v == VOID { VOID } else { names[usize::from(*v)] };
        let renamed = Case {
            n_classes: case.n_classes,
            labels: case.labels.iter().map(rename).collect(),
            predictions: case.predictions.iter().map(rename).collect(),
        };
        let (a, b) = (whole(&case).scores(), whole(&renamed).scores());
        for c in 0..case.n_classes {
            assert_eq!(a.iou[c], b.iou[usize::from(names[c])]);
            assert_eq!(a.class_accuracy[c], b.class_accuracy[usize::from(names[c])]);
        }
        assert_eq!((a.n_classes_present, a.n_pixels), (b.n_classes_present, b.n_pixels));
        // Summing in another order moves the last digits.
        for (x, y) in [(a.miou, b.miou), (a.fw_iou, b.fw_iou), (a.mean_accuracy, b.mean_accuracy)] {
            assert!((x - y).abs() < 1e-12 || (x.is_nan() && y.is_nan()));
        }
    }
}
