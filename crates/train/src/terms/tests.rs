//! Terms as recipes write them.

use super::*;

fn term(text: &str) -> std::result::Result<TermConfig, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

#[test]
fn a_term_is_one_table() {
    let kd = term(r#"{ "loss": "kd", "weight": 2.0, "temperature": 4.0, "schedule": "ramp-down" }"#).unwrap();
    assert_eq!(kd.loss, TermKind::Kd { temperature: 4.0, normaliser: KdNormaliser::MeanPixel });
    assert_eq!((kd.weight, kd.schedule), (2.0, ScheduleConfig::RampDown));
    let json = serde_json::to_string(&kd).unwrap();
    assert_eq!(term(&json).unwrap(), kd);
}

#[test]
fn what_is_no_setting_is_refused_with_the_settings_there_are() {
    let error = term(r#"{ "loss": "kd", "weight": 1.0, "temprature": 4.0 }"#).unwrap_err();
    assert!(error.contains("term `kd`") && error.contains("temprature") && error.contains("temperature"), "{error}");
    let error = term(r#"{ "loss": "csc", "weight": 1.0, "temperature": 4.0 }"#).unwrap_err();
    assert!(error.contains("term `csc`") && error.contains("temperature"), "{error}");
    let error = term(r#"{ "loss": "kdd", "weight": 1.0 }"#).unwrap_err();
    assert!(error.contains("kdd") && error.contains("cirkd-pixel"), "{error}");
    assert!(term(r#"{ "weight": 1.0 }"#).unwrap_err().contains("`loss`"));
    assert!(term(r#"{ "loss": "ce" }"#).unwrap_err().contains("weight"));
}

#[test]
fn names_tell_unusual_maps() {
    let name = |text| term(text).unwrap().loss.name();
    assert_eq!(name(r#"{ "loss": "cwd", "weight": 1.0 }"#), "cwd");
    assert_eq!(name(r#"{ "loss": "cwd", "weight": 1.0, "tap": "decoder" }"#), "cwd-decoder");
    assert_eq!(name(r#"{ "loss": "at", "weight": 1.0, "tap": ["high", "fc7"] }"#), "at-high-fc7");
}

#[test]
fn settings_outside_their_range_are_named() {
    let refused = |kind: TermKind| kind.validate().unwrap_err().to_string();
    let text = refused(TermKind::Kd { temperature: 0.0, normaliser: KdNormaliser::MeanPixel });
    assert!(text.contains("term `kd`: temperature = 0"), "{text}");
    assert!(refused(TermKind::Ce { label_smoothing: 1.0 }).contains("label_smoothing = 1"));
    for name in TermKind::NAMES {
        let kind = TermKind::named(name).unwrap();
        kind.validate().unwrap();
        assert_eq!(kind.loss(), name);
    }
}
