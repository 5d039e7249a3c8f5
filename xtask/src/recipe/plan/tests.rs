//! What plans resolve to, and what they refuse.

use segdistill_ops::Precision;

use super::*;

fn args(recipe: &str, set: &[&str]) -> RecipeArgs {
    RecipeArgs {
        recipe: recipe.into(),
        data_root: None,
        set: set.iter().map(|s| s.to_string()).collect(),
        out: None,
        seeds: None,
        methods: None,
        precision: None,
        device: crate::cli::DeviceArgs { device: Some("cpu".into()), tf32: false },
    }
}

#[test]
fn every_embedded_recipe_resolves() {
    for (name, _) in super::super::layers::EMBEDDED {
        let mut args = args(name, &[]);
        if name.starts_with("camvid") || name.starts_with("cityscapes") {
            args.data_root = Some(std::env::temp_dir());
        }
        let plan = Plan::resolve(&args).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert_eq!(plan.recipe, name);
        let back: Plan = toml::from_str(&plan.to_toml().unwrap()).unwrap();
        assert_eq!(back, plan, "{name} survives its TOML");
    }
}

#[test]
fn weights_of_recipes_reach_the_stages_they_are_for() {
    let resolve = |name: &str, set: &[&str]| {
        let mut args = args(name, set);
        args.data_root = Some(std::env::temp_dir());
        Plan::resolve(&args)
    };
    let from = |start: Option<&Start>| start.map(|s| s.from.clone());
    let patent = resolve("cityscapes", &[]).unwrap();
    assert_eq!(from(patent.start_of(&patent.teacher)).unwrap(), "timm/xception65.tf_in1k");
    assert_eq!(from(patent.start_of(&patent.students[0])).unwrap(), "timm/resnet34");
    assert_eq!((patent.teacher_weights.as_ref(), patent.teacher.model.encoder.as_str()), (None, "xception65"));
    let given = resolve("cityscapes-segformer", &[]).unwrap();
    assert_eq!(given.teacher_weights.as_deref(), Some(Path::new("smp-hub/segformer-b2-1024x1024-city-160k")));
    assert_eq!(from(given.start_of(&given.teacher)), None);
    assert_eq!((given.teacher.model.name.as_str(), given.teacher.model.decoder_channels), ("segformer", 768));
    assert_eq!(given.weights_lock, Path::new("weights.lock"));
    let DataPlan::Files { dataset, .. } = &given.data else { panic!("{:?}", given.data) };
    assert_eq!((dataset.as_str(), given.students[0].model.n_classes), ("cityscapes", 19));
    let named = |plan: &Plan| plan.weights_by_name().into_iter().map(|(_, _, name)| name).collect::<Vec<_>>();
    assert_eq!(named(&patent), ["timm/xception65.tf_in1k", "timm/resnet34"]);
    assert_eq!(named(&given), ["smp-hub/segformer-b2-1024x1024-city-160k", "timm/resnet34"]);
    let absent = resolve("cityscapes", &["student.encoder_weights=timm/resnet340"]).unwrap_err();
    assert_eq!(crate::exit::code_of(&absent), crate::exit::UNAVAILABLE);
    let both = resolve("cityscapes", &["student.weights=timm/resnet34"]).unwrap_err();
    assert!(format!("{both:#}").contains("student.weights and student.encoder_weights are both set"), "{both:#}");
    assert_eq!(lock_beside("a/b.toml"), Path::new("a/weights.lock"));
}

#[test]
fn a_network_is_named_whole_and_its_auxiliary_head_joins_the_objective() {
    let set = ["teacher.model=fcn8s-vgg16", "student.model=pspnet-resnet18-deep", "student.aux=true"];
    let plan = Plan::resolve(&args("toy", &set)).unwrap();
    assert_eq!(plan.teacher.model.full_name(), "fcn8s-vgg16");
    let names = |stage: &segdistill_train::Stage| stage.terms.iter().map(|t| t.loss.name()).collect::<Vec<_>>();
    assert_eq!(names(&plan.teacher), ["ce"]);
    for student in &plan.students {
        assert_eq!(student.model.full_name(), "pspnet-resnet18-deep");
        assert_eq!(names(student).last(), Some(&"aux".to_string()));
    }
    for (set, said) in [
        (vec!["teacher.model=fcn9s-vgg16"], "unknown model `fcn9s`"),
        (vec!["teacher.model=fcn8s-vgg16", "teacher.encoder=resnet18"], "are both set"),
        (vec!["student.aux=true"], "aux is true"),
        (vec!["student.layout=smb"], "unknown layout `smb`, known: paper, smp"),
    ] {
        let error = Plan::resolve(&args("toy", &set)).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), 2);
        assert!(format!("{error:#}").contains(said), "{error:#}");
    }
}

#[test]
fn all_is_the_baseline_and_every_method_that_compares_with_a_teacher_once() {
    let with = |recipe: &str, methods: &[&str]| {
        let methods = Some(methods.iter().map(ToString::to_string).collect());
        let data_root = (recipe != "toy").then(std::env::temp_dir);
        Plan::resolve(&RecipeArgs { methods, data_root, ..args(recipe, &["seeds=[0]"]) }).unwrap()
    };
    let names = |plan: &Plan| plan.students.iter().map(|s| s.method.clone()).collect::<Vec<_>>();
    let all = with("toy", &["all"]);
    let expected = "ce,ace,af-dcd,at,cirkd,csc,csc+ace,cwd,cwd-features,dist,fitnet,ifvd,kd,mgd,skd,skd-hinge";
    assert_eq!(names(&all).join(","), expected);
    assert!(all.students[1..].iter().all(segdistill_train::Stage::needs_teacher));
    let first = &all.students[0];
    for s in &all.students {
        assert_eq!((&s.model, s.seed, s.steps, &s.input), (&first.model, first.seed, first.steps, &first.input));
    }
    // Every loss has a method that uses it, but for those that only stand for labels in other ways.
    let used: std::collections::BTreeSet<&str> =
        all.students.iter().flat_map(|s| s.terms.iter().map(|t| t.loss.loss())).collect();
    let unused: Vec<&str> = segdistill_train::TermKind::NAMES.into_iter().filter(|name| !used.contains(name)).collect();
    assert_eq!(unused, ["aux", "ohem", "dice", "lovasz", "bce"]);
    for method in ["ohem", "dice+ce", "lovasz+ce", "csc+ce"] {
        assert_eq!(names(&with("toy", &[method])), [method]);
    }
    assert_eq!(names(&with("toy", &["kd", "all"]))[..2], ["kd", "ce"], "what `all` brings stands once");
    // Weights are those of the data set where its source has others.
    let weight = |recipe: &str| with(recipe, &["af-dcd"]).students[0].terms[0].weight;
    assert_eq!((weight("toy"), weight("camvid")), (2e-6, 8e-6));
    let mut own = args("camvid", &[r#"objectives.af-dcd.terms=[{ loss = "kd", weight = 7.0 }]"#]);
    (own.methods, own.data_root) = (Some(vec!["af-dcd".into()]), Some(std::env::temp_dir()));
    assert_eq!(Plan::resolve(&own).unwrap().students[0].terms[0].weight, 7.0, "what was written stands");
    // Those of a data set that nobody knows would stand there unused.
    let slip = args("toy", &[r#"objectives.kd.on.cityscape.terms=[{ loss = "kd", weight = 7.0 }]"#]);
    let error = Plan::resolve(&slip).unwrap_err();
    assert_eq!(crate::exit::code_of(&error), 2);
    assert!(format!("{error:#}").contains("did you mean `cityscapes`?"), "{error:#}");
}

/// What a step would refuse is refused before the teacher is trained.
#[test]
fn maps_too_small_for_a_term_are_refused_with_the_plan() {
    let refused = |method: &str, set: &[&str], said: &str| {
        let methods = Some(vec![method.to_string()]);
        let error = Plan::resolve(&RecipeArgs { methods, ..args("toy", set) }).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), 2, "{error:#}");
        assert!(format!("{error:#}").contains(said), "{error:#}");
    };
    // DeepLabV3's logits of 96x128 at stride 16.
    refused("skd", &["student.name=deeplabv3"], "`logits` of a crop of [96, 128] is 6 x 8, expected at least 8 x 8");
    let wide =
        r#"objectives.mine.terms=[{loss="af-dcd",weight=1.0,pooling=4,patch=7,groups=16},{loss="ce",weight=1.0}]"#;
    refused("mine", &[wide], "expected at least 28 x 28");
    let hinge =
        r#"objectives.mine.terms=[{loss="holistic",weight=1.0,form="hinge",penalty=10.0},{loss="ce",weight=1.0}]"#;
    refused("mine", &[hinge], "`penalty` without form = \"wgan-gp\"");
}

#[test]
fn a_resumed_run_may_gain_methods_and_seeds_and_nothing_else() {
    let plan = |methods: &[&str], set: &[&str]| {
        let methods = Some(methods.iter().map(ToString::to_string).collect());
        Plan::resolve(&RecipeArgs { methods, ..args("toy", set) }).unwrap()
    };
    let saved = plan(&["ce", "kd"], &["seeds=[0]"]);
    assert_eq!(plan(&["ce", "cwd", "kd"], &["seeds=[1, 0]"]).without_new(&saved), saved);
    assert_ne!(plan(&["ce", "kd"], &["seeds=[0]", "train.steps=77"]).without_new(&saved), saved);
    assert_ne!(plan(&["ce"], &["seeds=[0]"]).without_new(&saved), saved, "nothing may be taken away");
}

#[test]
fn a_sweep_is_a_grid_around_one_method_beside_the_baseline() {
    let sweep = |method: &str, vary: &[&str], set: &[&str]| {
        let vary: Vec<Variation> = vary.iter().map(|v| v.parse().unwrap()).collect();
        Plan::resolve_sweep(&args("toy", set), method, &vary)
    };
    let (plan, variants) = sweep("kd", &["kd.weight=0.1,1", "kd.temperature=1,4"], &["seeds=[0, 1]"]).unwrap();
    let names: Vec<&str> = variants.iter().map(|v| v.method.as_str()).collect();
    assert_eq!(names[1], "kd_kd.weight=0.1_kd.temperature=4");
    assert_eq!((variants.len(), plan.students.len()), (4, 2 * (1 + 4)));
    let term = &plan.students[2 * 2].terms[0];
    assert_eq!((plan.students[2 * 2].method.as_str(), term.weight), (names[1], 0.1));
    assert_eq!(
        term.loss,
        segdistill_train::TermKind::Kd { temperature: 4.0, normaliser: segdistill_train::KdNormaliser::MeanPixel }
    );
    let own = [r#"objectives.mine.terms=[{ loss = "csc", weight = 1.0 }, { loss = "ce", weight = 1.0 }]"#];
    assert_eq!(sweep("mine", &["csc.weight=1,2"], &own).unwrap().1.len(), 2);
    for (method, vary, said) in [
        ("kdd", "kd.weight=1", "unknown method `kdd`"),
        ("kd", "csc.weight=1", "method `kd` has no term `csc`, its terms: kd, ce"),
        (
            "kd",
            "kd.temprature=1",
            "expected `temperature` or `normaliser`; besides, every term has `weight` and `schedule`",
        ),
        ("kd", "kd.temperature=hot", "hot"),
        ("kd", "kd.temperature=0", "temperature = 0"),
        ("kd", "kd.loss=csc", "not a setting"),
        ("kd", "kd.weight=1,1.0", "are the same objective"),
        ("fitnet", "fitnet.tap=nosuch", "the student has no map `nosuch`, known: logits, penultimate"),
        ("af-dcd", "af-dcd.groups=7", "in 7 groups"),
    ] {
        let error = sweep(method, &[vary], &[]).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), 2, "{vary}");
        assert!(format!("{error:#}").contains(said), "{error:#}");
    }
}

#[test]
fn an_unknown_key_names_the_nearest() {
    let error = Plan::resolve(&args("toy", &["optim.lrr=1"])).unwrap_err();
    assert_eq!(crate::exit::code_of(&error), 2);
    let text = format!("{error:#}");
    assert!(text.contains("`optim.lrr`") && text.contains("`optim.lr`"), "{text}");
}

#[test]
fn settings_reach_the_stages_and_keep_their_types() {
    let plan = Plan::resolve(&args("toy", &["optim.lr=1", "train.steps=77", "student.encoder=resnet34"])).unwrap();
    assert_eq!((plan.students[0].optim.lr, plan.students[0].steps), (1.0, 77));
    assert_eq!(plan.students[0].model.encoder, "resnet34");
    let text = format!("{:#}", Plan::resolve(&args("toy", &["train.steps=many"])).unwrap_err());
    assert!(text.contains("`train.steps`") && text.contains("many") && text.contains("whole number"), "{text}");
    let quoted = args("toy", &[r#"objectives."csc+ce".terms=[{ loss = "ce", weight = 2.0 }]"#]);
    let plan = Plan::resolve(&quoted).unwrap();
    let weight = |m: &str| plan.students.iter().find(|s| s.method == m).unwrap().terms[0].weight;
    assert_eq!((weight("csc+ce"), weight("ce")), (2.0, 1.0));
}

#[test]
fn a_short_run_warms_up_for_a_tenth_of_itself_unless_told_otherwise() {
    let warmups = |set: &[&str]| {
        let plan = Plan::resolve(&args("toy", set))?;
        Ok::<_, anyhow::Error>((plan.teacher.optim.warmup_steps, plan.students[0].optim.warmup_steps))
    };
    assert_eq!(warmups(&["train.steps=20"]).unwrap(), (30, 2));
    assert_eq!(warmups(&["train.steps=20", "teacher.steps=5"]).unwrap(), (0, 2));
    assert_eq!(warmups(&["train.steps=31"]).unwrap(), (30, 30));
    let refused = warmups(&["train.steps=20", "optim.warmup_steps=30"]).unwrap_err();
    assert!(format!("{refused:#}").contains("optim.warmup_steps = 30 of 20 steps"), "{refused:#}");
}

#[test]
fn the_precision_reaches_every_stage_and_the_flag_is_a_setting() {
    let precisions = |plan: &Plan| -> Vec<Precision> {
        std::iter::once(&plan.teacher).chain(&plan.students).map(|s| s.precision).collect()
    };
    let default = Plan::resolve(&args("toy", &[])).unwrap();
    assert!(precisions(&default).iter().all(|p| *p == Precision::F32));
    let set = Plan::resolve(&args("toy", &["train.precision=bf16"])).unwrap();
    assert!(precisions(&set).iter().all(|p| *p == Precision::Bf16));
    let toml = set.to_toml().unwrap();
    assert_eq!(toml.matches("precision = \"bf16\"").count(), 1 + set.students.len(), "{toml}");
    let flag = RecipeArgs { precision: Some("bf16".into()), ..args("toy", &["train.precision=f32"]) };
    assert_eq!(Plan::resolve(&flag).unwrap(), set, "the flag comes after --set");

    // Plans of versions that knew one precision.
    let toml = default.to_toml().unwrap();
    let older = toml.replace("precision = \"f32\"\n", "");
    assert!(older.len() < toml.len());
    assert_eq!(toml::from_str::<Plan>(&older).unwrap(), default);
}

#[test]
fn what_this_processor_lacks_is_a_usage_error() {
    let plan = Plan::resolve(&args("toy", &["train.precision=bf16"])).unwrap();
    match (Precision::Bf16.on_cpu(), plan.check_precision(&Device::Cpu)) {
        (Ok(_), checked) => checked.unwrap(),
        (Err(why), checked) => {
            let error = checked.unwrap_err();
            assert_eq!(crate::exit::code_of(&error), 2);
            assert!(format!("{error:#}").contains(&why.to_string()), "{error:#}");
        }
    }
    Plan::resolve(&args("toy", &[])).unwrap().check_precision(&Device::Cpu).unwrap();
}

#[test]
fn what_is_set_but_unused_is_refused() {
    let mut a = args("camvid-quick", &["data.height=64"]);
    a.data_root = Some(std::env::temp_dir());
    assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains("data.height"));
    let mut a = args("toy", &[]);
    a.data_root = Some(std::env::temp_dir());
    assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains("not used"));
}

#[test]
fn unknown_recipes_methods_and_ranges_are_usage_errors() {
    for (recipe, set, expected) in [
        ("tiny", vec![], "known: toy, camvid, camvid-quick"),
        ("toy", vec!["optim.momentum=1.5"], "optim.momentum = 1.5"),
        ("toy", vec!["student.encoder=resnet19"], "resnet18"),
        ("toy", vec!["dataset=cityscape"], "camvid"),
        ("toy", vec!["optim.lr"], "KEY=VALUE"),
        ("toy", vec!["=1"], "KEY=VALUE"),
        ("toy", vec!["lr=1"], "`optim.lr`"),
        ("toy", vec!["steps=100"], "steps`"),
        ("toy", vec!["seeds=0"], "list in brackets"),
        ("toy", vec!["optim.lr=abc"], "`optim.lr` in --set is \"abc\""),
        ("toy", vec!["extends=camvid"], "--recipe"),
        ("toy", vec!["objectives.cse.terms=[]"], "`cse`"),
        ("toy", vec!["teacher.lr=-1"], "teacher.lr = -1"),
        ("toy", vec!["optim.weight_decay=inf"], "optim.weight_decay = inf"),
        ("toy", vec!["train.precision=f16"], "`f16`, expected `f32` or `bf16` in `train.precision`"),
        ("toy", vec!["train.precision=16"], "`train.precision` in --set is 16"),
    ] {
        let error = Plan::resolve(&args(recipe, &set)).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), 2, "{error:#}");
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
    let mut a = args("toy", &[]);
    for (method, expected) in [("cscc", "csc+ce"), ("../x", "letters"), ("teacher", "letters")] {
        a.methods = Some(vec![method.into()]);
        assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains(expected));
    }
}
