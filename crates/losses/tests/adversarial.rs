//! The losses of a discriminator's scores against PyTorch, plain sums, finite differences and their laws.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{as_ops, elements, fixture, relative, scalar};
use segdistill_losses::{LossError, Result, gradient_penalty, hinge_critic, hinge_student, wgan_critic, wgan_student};
use segdistill_ops::graph;
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64};

/// A loss of the student's scores and the teacher's; some read one alone.
type Loss = fn(&Tensor, &Tensor) -> Result<Tensor>;

const LOSSES: [(&str, Loss); 5] = [
    ("wgan_critic", wgan_critic),
    ("wgan_student", |student, _| wgan_student(student)),
    ("hinge_critic", hinge_critic),
    ("hinge_student", |student, _| hinge_student(student)),
    ("gradient_penalty", |student, _| gradient_penalty(student)),
];

#[test]
fn values_and_gradients_are_pytorchs() -> Result<()> {
    for device in devices() {
        for (case, parts) in fixture("adversarial") {
            for (name, loss) in LOSSES {
                for (dtype, bound) in [(DType::F64, 1e-9), (DType::F32, 1e-5)] {
                    let var = |part: &str| Var::from_tensor(&parts[part].to_dtype(dtype)?.to_device(&device)?);
                    let (student, teacher) = (var("student")?, var("teacher")?);
                    let value = loss(&student, &teacher)?;
                    let gradients = graph::backward(value.clone()).expect("a walk");
                    let of = |var: &Var| gradients.get(var).map_or_else(|| var.zeros_like(), |g| Ok(g.clone()));
                    let found = Tensor::cat(&[&value.reshape(1)?, &of(&student)?, &of(&teacher)?], 0)?;
                    assert_close(&found, &parts[name], bound, &format!("{case}, {name}: order of summation"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn values_are_the_plain_sums() -> Result<()> {
    let (student, teacher) = ((random_f64(1, "student", &[6]) * 3.0)?, (random_f64(1, "teacher", &[4]) * 3.0)?);
    let (s, t) = (elements(&student), elements(&teacher));
    let mean = |values: &[f64], f: &dyn Fn(f64) -> f64| values.iter().map(|v| f(*v)).sum::<f64>() / values.len() as f64;
    let expected = [
        mean(&s, &|v| v) - mean(&t, &|v| v),
        -mean(&s, &|v| v),
        mean(&t, &|v| (1.0 - v).max(0.0)) + mean(&s, &|v| (1.0 + v).max(0.0)),
        -mean(&s, &|v| v),
        mean(&s, &|v| (v - 1.0) * (v - 1.0)),
    ];
    for ((name, loss), expected) in LOSSES.into_iter().zip(expected) {
        assert!(relative(scalar(&loss(&student, &teacher)?), expected) < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn gradients_are_finite_differences() -> Result<()> {
    // Away from the margins, where the hinge has no derivative.
    let student = Tensor::new(&[0.3f64, -2.5, 1.7, -0.4], &Device::Cpu)?;
    let teacher = Tensor::new(&[2.3f64, -0.5, 0.7], &Device::Cpu)?;
    for loss in [wgan_critic as Loss, hinge_critic] {
        check_gradient(&[student.clone(), teacher.clone()], |x| as_ops(loss(&x[0], &x[1])), 4, 1e-8).unwrap();
    }
    for loss in [wgan_student, hinge_student, gradient_penalty] {
        check_gradient(std::slice::from_ref(&student), |x| as_ops(loss(&x[0])), 4, 1e-8).unwrap();
    }
    Ok(())
}

#[test]
fn laws_of_the_game() -> Result<()> {
    let scores = random_f64(2, "scores", &[5]);
    assert_eq!(scalar(&wgan_critic(&scores, &scores)?), 0.0, "what cannot be told apart");
    // Beyond both margins the discriminator has nothing to learn.
    let [low, high] = [-1.0, 1.0].map(|side| scores.zeros_like().unwrap().affine(1.0, side).unwrap());
    assert_eq!(scalar(&hinge_critic(&low, &high)?), 0.0);
    let var = Var::from_tensor(&low)?;
    let gradients = graph::backward(hinge_critic(&var, &high)?).expect("a walk");
    assert!(elements(gradients.get(&var).expect("a gradient")).iter().all(|g| *g == 0.0), "0 on the margin");
    assert_eq!(scalar(&gradient_penalty(&high)?), 0.0);
    // A batch is the mean of its images, in any order.
    let (a, b) = (scores.narrow(0, 0, 2)?, scores.narrow(0, 2, 3)?);
    for (name, loss) in LOSSES {
        let [whole, first, second] = [&scores, &a, &b].map(|s| scalar(&loss(s, &high).unwrap()));
        assert!((whole - (0.4 * first + 0.6 * second)).abs() < 1e-12, "{name}");
        let turned = Tensor::cat(&[&b, &a], 0)?;
        assert!((whole - scalar(&loss(&turned, &high)?)).abs() < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn what_is_no_vector_of_scores_is_refused() {
    let good = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let map = Tensor::zeros((3, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let empty = Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap();
    let [wide, bytes] = [DType::F64, DType::U8].map(|dtype| good.to_dtype(dtype).unwrap());
    for (name, loss) in LOSSES {
        assert!(matches!(loss(&map, &good), Err(LossError::Shape { .. })), "{name}");
        assert!(matches!(loss(&empty, &good), Err(LossError::Shape { .. })), "{name}");
        assert!(matches!(loss(&bytes, &good), Err(LossError::DType { .. })), "{name}");
    }
    for loss in [wgan_critic, hinge_critic] {
        assert!(matches!(loss(&good, &map), Err(LossError::Shape { .. })));
        assert!(matches!(loss(&good, &wide), Err(LossError::DType { tensor: "teacher_scores_n", .. })));
    }
}
