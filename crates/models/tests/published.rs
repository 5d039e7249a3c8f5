//! Published networks have the published parameters, to the last one, and multiply-accumulates within 1 %.

use segdistill_models::{Configuration, configurations};

/// Name, parameters, and 10^9 multiply-accumulates at the configuration's size where its source states them.
const PUBLISHED: &[(&str, usize, Option<f64>)] = &[
    // CIRKD's models, auxiliary heads included; 19 classes, 512x1024.
    ("cirkd/deeplabv3-resnet101-deep", 61_118_950, Some(515.8)),
    ("cirkd/deeplabv3-resnet101-deep+no-aux", 58_754_259, None),
    ("cirkd/deeplabv3-resnet101-deep+11-classes", 61_114_838, None),
    ("cirkd/deeplabv3-resnet101-deep+1024x2048", 61_118_950, Some(2063.4)),
    ("cirkd/deeplabv3-resnet18-deep", 13_607_974, Some(129.4)),
    ("cirkd/deeplabv3-resnet18-deep+no-aux", 13_459_155, None),
    ("cirkd/deeplabv3-resnet18-deep+11-classes", 13_606_422, None),
    ("cirkd/deeplabv3-resnet18-deep+1024x2048", 13_607_974, Some(517.5)),
    ("cirkd/pspnet-resnet18-deep", 12_919_334, Some(122.1)),
    ("cirkd/pspnet-resnet18-deep+no-aux", 12_770_515, None),
    ("cirkd/pspnet-resnet18-deep+11-classes", 12_917_782, None),
    ("cirkd/pspnet-resnet18-deep+1024x2048", 12_919_334, Some(488.5)),
    ("cirkd/deeplabv3-mobilenetv2", 3_233_171, Some(26.6)),
    ("cirkd/deeplabv3-mobilenetv2+11-classes", 3_232_139, None),
    ("cirkd/deeplabv3-mobilenetv2+1024x2048", 3_233_171, Some(106.5)),
    // SKD's, 19 classes, 512x1024.
    ("skd/pspnet-resnet101-deep", 70_437_350, Some(574.9)),
    ("skd/pspnet-resnet101-deep+no-aux", 65_707_475, None),
    ("skd/pspnet-resnet18-deep", 13_068_262, Some(125.8)),
    ("skd/pspnet-resnet18-deep+no-aux", 12_770_515, None),
    // Long et al. 2015 and SegNet's and U-Net's own structures.
    ("paper/fcn32s-vgg16", 136_152_917, None),
    ("paper/fcn16s-vgg16", 134_815_994, None),
    ("paper/fcn8s-vgg16", 134_489_759, None),
    ("paper/fcn32s-vgg16+11-classes", 134_801_227, None),
    ("paper/fcn16s-vgg16+11-classes", 134_437_094, None),
    ("paper/fcn8s-vgg16+11-classes", 134_348_929, None),
    ("paper/segnet-vgg16-bn", 29_449_355, None),
    ("paper/segnet-vgg16-bn+19-classes", 29_453_971, None),
    ("paper/unet-unet", 31_032_395, None),
    ("paper/unet-unet-bn", 31_038_283, None),
    ("paper/unet-unet-bn-bias", 31_044_171, None),
    ("paper/segformer-mit-b0", 3_719_027, None),
    ("paper/segformer-mit-b1", 13_682_131, None),
    ("paper/segformer-mit-b2", 27_361_235, None),
    ("paper/segformer-mit-b3", 47_237_075, None),
    ("paper/segformer-mit-b4", 64_007_635, None),
    ("paper/segformer-mit-b5", 84_607_955, None),
    // segmentation_models.pytorch, 19 classes, 512x512.
    ("smp/deeplabv3plus-resnet18", 12_333_923, Some(18.3)),
    ("smp/deeplabv3plus-resnet34", 22_442_083, Some(31.6)),
    ("smp/deeplabv3plus-resnet101", 45_674_339, Some(56.0)),
    ("smp/deeplabv3plus-mobilenetv2", 4_383_139, Some(6.0)),
    ("smp/deeplabv3plus-xception65", 41_041_491, Some(50.2)),
    ("smp/deeplabv3plus-xception41", 28_094_739, Some(37.1)),
    ("smp/deeplabv3plus-resnet18+11-classes", 12_333_923 - 2056, None),
    ("smp/deeplabv3plus-resnet34+11-classes", 22_442_083 - 2056, None),
    ("smp/deeplabv3plus-resnet101+11-classes", 45_674_339 - 2056, None),
    ("smp/deeplabv3plus-mobilenetv2+11-classes", 4_383_139 - 2056, None),
    ("smp/deeplabv3plus-xception65+11-classes", 41_041_491 - 2056, None),
    ("smp/deeplabv3plus-xception41+11-classes", 28_094_739 - 2056, None),
    ("smp/unet-resnet18", 14_330_819, Some(22.3)),
    ("smp/unet-resnet34", 24_438_979, Some(31.9)),
    ("smp/deeplabv3-resnet18", 15_903_571, Some(66.9)),
    ("smp/segformer-mit-b0", 3_719_027, Some(6.8)),
    // torchvision, 21 classes, no auxiliary head.
    ("torchvision/fcn-resnet50", 32_957_013, None),
    ("torchvision/fcn-resnet101", 51_949_141, None),
    ("torchvision/deeplabv3-resnet50", 39_638_869, None),
    ("torchvision/deeplabv3-resnet101", 58_630_997, None),
    // Encoders without their classifiers.
    ("encoder/resnet18", 11_176_512, None),
    ("encoder/resnet34", 21_284_672, None),
    ("encoder/resnet50", 23_508_032, None),
    ("encoder/resnet101", 42_500_160, None),
    ("encoder/mobilenetv2", 2_223_872, None),
    // timm's figure; two operations a normalised element are in it, a 130th of the whole.
    ("encoder/xception65", 37_867_312, Some(13.96)),
    ("encoder/densenet169", 12_484_480, None),
];

#[test]
fn every_published_count_is_met() {
    let all = configurations();
    let mut wrong = Vec::new();
    for &(name, params, gmacs) in PUBLISHED {
        let Some(configuration) = all.iter().find(|c| c.name == name) else {
            wrong.push(format!("{name}: there is none"));
            continue;
        };
        let cost = match configuration.cost() {
            Ok(cost) => cost,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        if cost.n_parameters != params {
            wrong.push(format!("{name}: {} parameters, published {params}", cost.n_parameters));
        }
        if let Some(expected) = gmacs {
            let found = cost.macs as f64 / 1e9;
            if (found / expected - 1.0).abs() >= 0.01 {
                wrong.push(format!("{name}: {found:.2} GMACs, published {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn names_are_unique_and_every_configuration_has_a_cost() {
    let all = configurations();
    let names: std::collections::BTreeSet<&str> = all.iter().map(|c: &Configuration| c.name.as_str()).collect();
    assert_eq!(names.len(), all.len());
    for configuration in &all {
        let cost = configuration.cost().unwrap_or_else(|error| panic!("{}: {error}", configuration.name));
        assert!(cost.n_parameters > 0 && cost.macs > 0, "{}", configuration.name);
    }
}
