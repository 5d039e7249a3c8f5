//! Transforms: image and labels stay together, draws depend on the key only, colours follow their formulas.

use segdistill_data::transform::{PAD_RGB, SampleKey, TrainTransform, resize_image_bilinear, resize_labels_nearest};
use segdistill_data::{LabelMap, RgbImage, Sample, VOID};

/// Blocks of one class each, eight pixels a side, whose colour is a code of the class.
fn coded(height: usize, width: usize) -> Sample {
    let id = |i: usize| ((i / width / 8) * 5 + (i % width) / 8 * 3) as u8 % 11;
    let ids: Vec<u8> = (0..height * width).map(id).collect();
    let rgb = ids.iter().flat_map(|id| code(*id)).collect();
    Sample { image: RgbImage { height, width, rgb }, labels: LabelMap { height, width, ids }, name: "coded".into() }
}

fn code(id: u8) -> [u8; 3] {
    [20 * id + 10, 250 - 20 * id, if id.is_multiple_of(2) { 40 } else { 200 }]
}

fn key(index: u64) -> SampleKey {
    SampleKey { seed: 3, epoch: 2, index }
}

fn geometric() -> TrainTransform {
    TrainTransform { scale: [0.5, 2.0], flip: 0.5, ..TrainTransform::plain([40, 56]) }
}

#[test]
fn the_colour_code_still_tells_the_label_after_scale_crop_and_flip() {
    let sample = coded(48, 64);
    let (mut pure, mut total, mut padded) = (0, 0, 0);
    for index in 0..60 {
        let out = geometric().apply(&sample, key(index)).unwrap();
        assert_eq!((out.image.hw(), out.labels.hw()), ([40, 56], [40, 56]));
        for (pixel, id) in out.image.rgb.chunks_exact(3).zip(&out.labels.ids) {
            if *id == VOID {
                assert_eq!(pixel, PAD_RGB);
                padded += 1;
                continue;
            }
            total += 1;
            // Away from a block's edge the colour is the code itself; at an edge the nearest label has at least half.
            pure += usize::from(pixel == code(*id));
        }
    }
    assert!(padded > 1000, "scales below 1 must show padding");
    // At the least scale a block is 4 pixels wide and (4 - 1)^2 / 4^2 of it is away from edges.
    assert!(pure as f64 > 0.56 * total as f64, "{pure} of {total}");

    // Two classes side by side: at most half a pixel of blending decides which label is nearest.
    let mut halves = coded(48, 64);
    for (i, id) in halves.labels.ids.iter_mut().enumerate() {
        *id = u8::from(i % 64 >= 29);
    }
    halves.image.rgb = halves.labels.ids.iter().flat_map(|id| [255 * id; 3]).collect();
    for index in 0..60 {
        let out = geometric().apply(&halves, key(index)).unwrap();
        for (pixel, id) in out.image.rgb.chunks_exact(3).zip(&out.labels.ids).filter(|(_, id)| **id != VOID) {
            assert!(if *id == 1 { pixel[0] >= 127 } else { pixel[0] <= 128 }, "{} for class {id}", pixel[0]);
        }
    }
}

#[test]
fn nothing_random_gives_the_sample_itself() {
    let sample = coded(40, 56);
    assert_eq!(TrainTransform::plain([40, 56]).apply(&sample, key(0)).unwrap(), sample);
    // Flip alone mirrors each row of both.
    let flipped = TrainTransform { flip: 1.0, ..TrainTransform::plain([40, 56]) }.apply(&sample, key(0)).unwrap();
    for y in 0..40 {
        for x in 0..56 {
            assert_eq!(flipped.image.at(y, x), sample.image.at(y, 55 - x));
            assert_eq!(flipped.labels.ids[y * 56 + x], sample.labels.ids[y * 56 + 55 - x]);
        }
    }
}

#[test]
fn a_crop_is_a_window_and_every_window_comes_up() {
    let sample = coded(34, 35);
    let crop = TrainTransform::plain([32, 32]);
    let mut seen = std::collections::BTreeSet::new();
    for index in 0..200 {
        let out = crop.apply(&sample, key(index)).unwrap();
        let fits = |(top, left): &(usize, usize)| {
            (0..32).all(|y| {
                (0..32).all(|x| {
                    out.labels.ids[y * 32 + x] == sample.labels.ids[(y + top) * 35 + x + left]
                        && out.image.at(y, x) == sample.image.at(y + top, x + left)
                })
            })
        };
        let windows = (0..3).flat_map(|t| (0..4).map(move |l| (t, l)));
        seen.insert(windows.clone().find(fits).expect("a crop without scale is a window of the sample"));
    }
    assert_eq!(seen.len(), 12);
}

#[test]
fn a_crop_larger_than_the_picture_pads_with_void_only() {
    let sample = coded(16, 16);
    let out = TrainTransform { brightness: 0.5, ..TrainTransform::plain([20, 24]) }.apply(&sample, key(5)).unwrap();
    let void = out.labels.ids.iter().filter(|id| **id == VOID).count();
    assert_eq!(void, 20 * 24 - 16 * 16);
    let padding = out.image.rgb.chunks_exact(3).zip(&out.labels.ids).filter(|(_, id)| **id == VOID);
    padding.for_each(|(pixel, _)| assert_eq!(pixel, PAD_RGB, "jitter must leave padding alone"));
}

#[test]
fn draws_depend_on_seed_epoch_and_index_only() {
    let sample = coded(48, 64);
    let all = TrainTransform { brightness: 0.4, contrast: 0.4, saturation: 0.4, ..geometric() };
    let base = all.apply(&sample, key(1)).unwrap();
    assert_eq!(base, all.apply(&sample, key(1)).unwrap());
    for other in [SampleKey { seed: 4, ..key(1) }, SampleKey { epoch: 3, ..key(1) }, SampleKey { index: 2, ..key(1) }] {
        assert_ne!(base, all.apply(&sample, other).unwrap(), "{other:?}");
    }
}

#[test]
fn jitter_follows_its_formulas() {
    let sample = coded(40, 56);
    let grey = |p: [f64; 3]| 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2];
    let pixels = |s: &Sample| -> Vec<[f64; 3]> {
        s.image.rgb.chunks_exact(3).map(|p| [f64::from(p[0]), f64::from(p[1]), f64::from(p[2])]).collect()
    };
    let source = pixels(&sample);
    let mean = source.iter().map(|p| grey(*p)).sum::<f64>() / source.len() as f64;
    let plain = TrainTransform::plain([40, 56]);
    // The factor is not told, so it is read off one channel value and must then explain every other.
    type Formula<'a> = &'a dyn Fn([f64; 3], usize, f64) -> f64;
    let brightness: Formula = &|p, c, f| p[c] * f;
    let contrast: Formula = &|p, c, f| mean + (p[c] - mean) * f;
    let saturation: Formula = &|p, c, f| grey(p) + (p[c] - grey(p)) * f;
    let cases = [
        (TrainTransform { brightness: 0.6, ..plain.clone() }, brightness),
        (TrainTransform { contrast: 0.6, ..plain.clone() }, contrast),
        (TrainTransform { saturation: 0.6, ..plain }, saturation),
    ];
    for (transform, formula) in cases {
        let mut farthest = 0f64;
        for index in 0..4 {
            let out = pixels(&transform.apply(&sample, key(index)).unwrap());
            let error = |f: f64| -> f64 {
                let off = |s: [f64; 3], o: [f64; 3], c: usize| (formula(s, c, f).clamp(0.0, 255.0) - o[c]).abs();
                let each = source.iter().zip(&out).flat_map(|(s, o)| (0..3).map(move |c| off(*s, *o, c)));
                each.fold(0.0, f64::max)
            };
            let factors = (400..=1600).map(|f| f64::from(f) / 1000.0);
            let best = factors.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap();
            // Half a step of rounding, and half a thousandth of the factor over at most 255.
            assert!(error(best) < 0.5 + 0.13 + 0.01, "factor {best}: off by {}", error(best));
            farthest = farthest.max((best - 1.0).abs());
        }
        assert!(farthest > 0.1, "the factor must move: {farthest}");
    }
}

#[test]
fn resizing_keeps_what_it_must() {
    let sample = coded(24, 40);
    assert_eq!(resize_image_bilinear(&sample.image, [24, 40]).unwrap(), sample.image);
    let flat = RgbImage::filled(13, 17, [7, 130, 255]);
    for hw in [[5, 5], [26, 51], [1, 1], [13, 40]] {
        assert_eq!(resize_image_bilinear(&flat, hw).unwrap(), RgbImage::filled(hw[0], hw[1], [7, 130, 255]));
    }
    // Shrinking by a whole number: nearest takes the middle of each cell.
    let small = resize_labels_nearest(&sample.labels, [8, 40]).unwrap();
    for y in 0..8 {
        assert_eq!(small.ids[y * 40..][..40], sample.labels.ids[(y * 3 + 1) * 40..][..40]);
    }
    // A black and white checkerboard of single pixels shrinks to grey, not to either colour.
    let board: Vec<u8> = (0..32 * 32).flat_map(|i| [255 * ((i / 32 + i) % 2) as u8; 3]).collect();
    let grey = resize_image_bilinear(&RgbImage { height: 32, width: 32, rgb: board }, [8, 8]).unwrap();
    assert!(grey.rgb.iter().all(|v| (118..=138).contains(v)), "{:?}", &grey.rgb[..24]);
    assert!(resize_image_bilinear(&flat, [0, 3]).is_err() && resize_labels_nearest(&sample.labels, [3, 0]).is_err());
}

#[test]
fn resizing_agrees_with_a_plain_triangle_filter() {
    // Written from the definition: weights max(0, 1 - |k - centre| / reach) over the whole picture, normalised.
    let rgb: Vec<u8> = (0..11 * 14 * 3).map(|i| (i * 97 % 251) as u8).collect();
    let image = RgbImage { height: 11, width: 14, rgb };
    for hw in [[4, 5], [23, 31], [5, 30]] {
        let out = resize_image_bilinear(&image, hw).unwrap();
        let weight = |from: usize, to: usize, i: usize, k: usize| {
            let ratio = from as f64 / to as f64;
            (1.0 - (k as f64 + 0.5 - (i as f64 + 0.5) * ratio).abs() / ratio.max(1.0)).max(0.0)
        };
        for (y, x, c) in (0..hw[0]).flat_map(|y| (0..hw[1]).flat_map(move |x| (0..3).map(move |c| (y, x, c)))) {
            let (mut sum, mut norm) = (0.0, 0.0);
            for (v, u) in (0..11).flat_map(|v| (0..14).map(move |u| (v, u))) {
                let w = weight(11, hw[0], y, v) * weight(14, hw[1], x, u);
                sum += w * f64::from(image.at(v, u)[c]);
                norm += w;
            }
            // Half a step of rounding, and f32 sums.
            assert!((f64::from(out.at(y, x)[c]) - sum / norm).abs() <= 0.501, "{hw:?} at {y}, {x}");
        }
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let plain = || TrainTransform::plain([8, 8]);
    for (transform, named) in [
        (TrainTransform { scale: [0.0, 1.0], ..plain() }, "scale"),
        (TrainTransform { scale: [1.5, 1.0], ..plain() }, "scale"),
        (TrainTransform { scale: [f64::NAN, 1.0], ..plain() }, "scale"),
        (TrainTransform { crop_hw: [0, 8], ..plain() }, "crop_hw"),
        (TrainTransform { base_hw: Some([8, 0]), ..plain() }, "base_hw"),
        (TrainTransform { flip: 1.5, ..plain() }, "flip = 1.5"),
        (TrainTransform { saturation: -0.1, ..plain() }, "saturation = -0.1"),
    ] {
        let error = transform.apply(&coded(8, 8), key(0)).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("hint:"), "{error}");
    }
    let mut torn = coded(8, 8);
    torn.labels = LabelMap::filled(8, 7, 0);
    assert!(plain().apply(&torn, key(0)).unwrap_err().to_string().contains("7x8"));
}

#[test]
fn base_size_comes_before_everything() {
    let sample = coded(48, 64);
    let base = TrainTransform { base_hw: Some([24, 32]), ..TrainTransform::plain([24, 32]) };
    let out = base.apply(&sample, key(0)).unwrap();
    assert_eq!(out.image, resize_image_bilinear(&sample.image, [24, 32]).unwrap());
    assert_eq!(out.labels, resize_labels_nearest(&sample.labels, [24, 32]).unwrap());
}
