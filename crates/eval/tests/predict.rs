//! The fused upsampling argmax equals a resize of every class followed by an argmax, and a naive loop.

use candle_core::{DType, Device, Tensor};
use segdistill_eval::predict_labels;
use segdistill_ops::resize_bilinear;
use segdistill_ops::testing::random_f64;

/// Per pixel: the classes' upsampled logits; true when `label` is the best or within `slack` of it.
fn check(upsampled_chw: &[f64], c: usize, labels: &[u8], slack: f64) {
    let n = labels.len();
    assert_eq!(upsampled_chw.len(), c * n);
    let mut n_exact = 0;
    for (i, &label) in labels.iter().enumerate() {
        let z = |class: usize| upsampled_chw[class * n + i];
        // First maximum: the lowest class wins a tie.
        let best = (1..c).fold(0, |best, class| if z(class) > z(best) { class } else { best });
        n_exact += usize::from(best == usize::from(label));
        assert!(z(best) - z(usize::from(label)) <= slack, "pixel {i}: class {label}, expected {best}");
    }
    assert!(n_exact * 1000 >= n * 999, "{n_exact} of {n} pixels agree");
}

const CASES: [([usize; 4], [usize; 2]); 6] = [
    ([2, 11, 12, 15], [48, 60]),
    ([1, 5, 23, 31], [91, 125]),
    ([1, 3, 1, 1], [7, 5]),
    ([1, 19, 16, 32], [16, 32]),
    ([3, 4, 30, 40], [11, 13]),
    ([1, 2, 1, 9], [3, 100]),
];

#[test]
fn equals_resize_then_argmax() {
    for (k, (dims, label_hw)) in CASES.into_iter().enumerate() {
        let logits = random_f64(k as u64, "predict", &dims).to_dtype(DType::F32).unwrap();
        let maps = predict_labels(&logits, label_hw).unwrap();
        let up = resize_bilinear(&logits, label_hw, false).unwrap().to_dtype(DType::F64).unwrap();
        assert_eq!(maps.len(), dims[0]);
        for (i, map) in maps.iter().enumerate() {
            let up = up.get(i).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            check(&up, dims[1], map, 1e-6); // both round in f32, values up to 1
        }
    }
}

#[test]
fn equals_a_naive_loop_in_f64() {
    for (k, (dims, [out_h, out_w])) in CASES.into_iter().enumerate() {
        let [n, c, h, w] = dims;
        let logits = random_f64(k as u64, "predict-naive", &dims);
        let maps = predict_labels(&logits, [out_h, out_w]).unwrap();
        let z = logits.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for image in 0..n {
            let mut up = vec![0.0; c * out_h * out_w];
            for class in 0..c {
                let plane = &z[(image * c + class) * h * w..][..h * w];
                for y in 0..out_h {
                    for x in 0..out_w {
                        let sy = ((y as f64 + 0.5) * h as f64 / out_h as f64 - 0.5).clamp(0.0, h as f64 - 1.0);
                        let sx = ((x as f64 + 0.5) * w as f64 / out_w as f64 - 0.5).clamp(0.0, w as f64 - 1.0);
                        let mut sum = 0.0;
                        // Every source pixel, weighted by its tent.
                        for i in 0..h {
                            for j in 0..w {
                                let wy = (1.0 - (sy - i as f64).abs()).max(0.0);
                                let wx = (1.0 - (sx - j as f64).abs()).max(0.0);
                                if wy * wx > 0.0 {
                                    sum += wy * wx * plane[i * w + j];
                                }
                            }
                        }
                        up[(class * out_h + y) * out_w + x] = sum;
                    }
                }
            }
            check(&up, c, &maps[image], 1e-6);
        }
    }
}

#[test]
fn equal_sizes_are_the_plain_argmax() {
    let logits = random_f64(4, "same", &[1, 7, 9, 10]).to_dtype(DType::F32).unwrap();
    let expected = logits.argmax(1).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let map = &predict_labels(&logits, [9, 10]).unwrap()[0];
    assert_eq!(map.iter().map(|&l| u32::from(l)).collect::<Vec<_>>(), expected);
}

#[test]
fn a_batch_equals_its_images_and_a_view_its_copy() {
    let logits = random_f64(5, "batch", &[3, 4, 6, 8]).to_dtype(DType::F32).unwrap();
    let all = predict_labels(&logits, [20, 17]).unwrap();
    for i in 0..3 {
        assert_eq!(predict_labels(&logits.narrow(0, i, 1).unwrap(), [20, 17]).unwrap()[0], all[i]);
    }
    let view = logits.transpose(2, 3).unwrap();
    let copy = Tensor::from_vec(view.flatten_all().unwrap().to_vec1::<f32>().unwrap(), (3, 4, 8, 6), &Device::Cpu);
    assert_eq!(predict_labels(&view, [17, 20]).unwrap(), predict_labels(&copy.unwrap(), [17, 20]).unwrap());
}
