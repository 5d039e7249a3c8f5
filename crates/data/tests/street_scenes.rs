//! Drawn scenes: reproducible, apart by seed, split and index, of any size, every class with its share, and none to be
//! told by colour alone.

use segdistill_data::stats::Stats;
use segdistill_data::{Dataset, Split, StreetScenes, StreetScenesConfig, VOID};

fn scenes(height: usize, width: usize, seed: u64, split: Split) -> StreetScenes {
    let cfg = StreetScenesConfig { height, width, seed, variety: 1.0, n_train: 128, n_val: 32, n_test: 32 };
    StreetScenes::new(cfg, split).unwrap()
}

#[test]
fn a_scene_is_a_function_of_seed_split_and_index() {
    let train = scenes(72, 96, 0, Split::Train);
    let first = train.sample(0).unwrap();
    assert_eq!(first, scenes(72, 96, 0, Split::Train).sample(0).unwrap());
    let threads: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..3).map(|_| scope.spawn(|| train.sample(0).unwrap())).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    assert!(threads.iter().all(|s| *s == first));
    for other in [
        train.sample(1).unwrap(),
        scenes(72, 96, 1, Split::Train).sample(0).unwrap(),
        scenes(72, 96, 0, Split::Val).sample(0).unwrap(),
        scenes(72, 96, 0, Split::Test).sample(0).unwrap(),
    ] {
        assert_ne!(other.image, first.image);
        assert_ne!(other.labels, first.labels);
        assert_ne!(other.name, first.name);
    }
    // The number of scenes changes none of them.
    let more = StreetScenesConfig { height: 72, width: 96, seed: 0, variety: 1.0, n_train: 1000, n_val: 1, n_test: 1 };
    assert_eq!(StreetScenes::new(more, Split::Train).unwrap().sample(0).unwrap(), first);
    assert!(train.sample(128).is_err());
}

#[test]
fn any_size_is_drawn_and_shows_the_same_street() {
    for hw in [[32, 32], [72, 96], [180, 240], [33, 75], [96, 33]] {
        for index in 0..4 {
            let sample = scenes(hw[0], hw[1], 3, Split::Train).sample(index).unwrap();
            assert_eq!((sample.image.hw(), sample.labels.hw()), (hw, hw));
            assert!(sample.labels.ids.iter().all(|id| *id < 11 || *id == VOID));
        }
    }
    // Twice the size: away from thin things and edges the labels are those of the smaller picture.
    let (small, large) = (scenes(60, 80, 3, Split::Train), scenes(120, 160, 3, Split::Train));
    let mut same = 0;
    for index in 0..6 {
        let (a, b) = (small.sample(index).unwrap().labels, large.sample(index).unwrap().labels);
        same += (0..60 * 80).filter(|i| a.ids[*i] == b.ids[i / 80 * 2 * 160 + i % 80 * 2]).count();
    }
    assert!(same as f64 > 0.93 * (6 * 60 * 80) as f64, "{same}");
    for hw in [[31, 64], [64, 8193]] {
        let cfg =
            StreetScenesConfig { height: hw[0], width: hw[1], seed: 0, variety: 1.0, n_train: 1, n_val: 0, n_test: 1 };
        assert!(StreetScenes::new(cfg.clone(), Split::Train).unwrap_err().to_string().contains("32..=8192"));
        let cfg = StreetScenesConfig { height: 64, width: 64, ..cfg };
        assert!(StreetScenes::new(cfg, Split::Val).unwrap_err().to_string().contains("n_val = 0"));
    }
}

#[test]
fn every_class_has_its_share() {
    for seed in [0, 11] {
        let data = scenes(96, 128, seed, Split::Train);
        let stats = Stats::of(&data).unwrap();
        let shares = stats.class_shares();
        for (id, class) in data.classes().classes.iter().enumerate() {
            let (share, images) = (shares[id], stats.images_with_class[id] as f64 / 128.0);
            assert!(share > 0.007, "{}: {share}", class.name);
            assert!(share < 0.4, "{}: {share}", class.name);
            assert!(images > 0.6, "{}: in {images} of the images", class.name);
        }
        let void = stats.void_pixels as f64 / stats.n_pixels() as f64;
        assert!((0.01..0.04).contains(&void), "void: {void}");
        // Exposure neither black nor burnt out, and with contrast.
        assert!(stats.rgb_mean().iter().all(|m| (0.25..0.6).contains(m)), "{:?}", stats.rgb_mean());
        assert!(stats.rgb_std().iter().all(|s| *s > 0.15), "{:?}", stats.rgb_std());
    }
}

#[test]
fn colour_and_place_alone_do_not_tell_the_class() {
    // The best guess from colour (16 levels a channel) and from row, learnt on train and scored on val as mean IoU.
    let (train, val) = (scenes(48, 64, 0, Split::Train), scenes(48, 64, 0, Split::Val));
    let score = |key: &dyn Fn(&[u8], usize) -> usize, n_keys: usize| {
        let mut votes = vec![[0u32; 11]; n_keys];
        let each = |data: &StreetScenes, f: &mut dyn FnMut(usize, usize)| {
            for index in 0..data.len() {
                let sample = data.sample(index).unwrap();
                for (i, (pixel, id)) in sample.image.rgb.chunks_exact(3).zip(&sample.labels.ids).enumerate() {
                    if *id != VOID {
                        f(key(pixel, i), usize::from(*id));
                    }
                }
            }
        };
        each(&train, &mut |key, id| votes[key][id] += 1);
        let guess: Vec<usize> = votes.iter().map(|v| (0..11).max_by_key(|c| v[*c]).unwrap()).collect();
        let (mut hit, mut truth, mut said) = ([0f64; 11], [0f64; 11], [0f64; 11]);
        each(&val, &mut |key, id| {
            truth[id] += 1.0;
            said[guess[key]] += 1.0;
            hit[id] += f64::from(u8::from(guess[key] == id));
        });
        let iou: Vec<f64> = (0..11).map(|c| hit[c] / (truth[c] + said[c] - hit[c])).collect();
        (iou.iter().sum::<f64>() / 11.0, iou)
    };
    let color = |p: &[u8]| usize::from(p[0] >> 4) << 8 | usize::from(p[1] >> 4) << 4 | usize::from(p[2] >> 4);
    let (by_color, iou) = score(&|p, _| color(p), 4096);
    assert!(by_color < 0.25, "{by_color}: {iou:?}");
    // The small classes least of all: none may be given away by its paint.
    for id in [2, 6, 7, 8, 9, 10] {
        assert!(iou[id] < 0.2, "class {id} by colour alone: {iou:?}");
    }
    let (by_place, iou) = score(&|_, i| i, 48 * 64);
    assert!(by_place < 0.3, "{by_place}: {iou:?}");
}
