//! tmp
use segdistill_data::*;
fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|s| s.parse().unwrap()).collect();
    let cfg = StreetScenesConfig { height: a[0], width: a[1], seed: 0, n_train: 512, n_val: 128, n_test: 128 };
    let d = StreetScenes::new(cfg, Split::Train).unwrap();
    let s: Vec<_> = (a[3]..a[3] + a[2]).map(|i| d.sample(i).unwrap()).collect();
    preview::write_png("/tmp/scenes.png".as_ref(), &preview::sheet(&s, d.classes(), a[4]).unwrap()).unwrap();
    let t = std::time::Instant::now();
    for i in 0..200 {
        std::hint::black_box(d.sample(i).unwrap());
    }
    println!("{:.2} ms", t.elapsed().as_secs_f64() * 1000.0 / 200.0);
    let st = stats::Stats::of(&d).unwrap();
    let tot = st.n_pixels() as f64;
    for (c, k) in d.classes().classes.iter().enumerate() {
        println!(
            "{:12} {:6.2}% in {:.0}% of images",
            k.name,
            100.0 * st.class_pixels[c] as f64 / tot,
            100.0 * st.images_with_class[c] as f64 / st.n_images as f64
        );
    }
    println!("void {:.2}%  mean {:?} std {:?}", 100.0 * st.void_pixels as f64 / tot, st.rgb_mean(), st.rgb_std());
}
