//! Our side of every case under `divan`: `cargo bench -p segdistill-benches [FILTER]`.
//!
//! `cargo xtask bench` is the one that compares with PyTorch and writes records; this one is for looking at one case
//! again and again while its code changes.

use std::fmt;

use divan::Bencher;
use segdistill_benches::case::{Case, Group, Precision};
use segdistill_benches::catalogue::cases;
use segdistill_benches::workload::prepare;
use segdistill_ops::alloc::Recycling;

#[global_allocator]
static ALLOCATOR: Recycling<mimalloc::MiMalloc> = Recycling::new(mimalloc::MiMalloc);

fn main() {
    // Backward walks the graph recursively: deep networks need more than the main thread's stack.
    let worker = std::thread::Builder::new().stack_size(64 << 20).spawn(divan::main);
    worker.expect("a thread can be started").join().expect("every case runs");
}

/// A case that prints its name alone.
struct Named(Case);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.name)
    }
}

fn of(group: Group) -> Vec<Named> {
    let all = cases().expect("the list of cases is whole");
    all.into_iter().filter(|case| case.group == group).map(Named).collect()
}

fn run(bencher: Bencher, case: &Case) {
    let mut workload = prepare(case, Precision::F32).unwrap_or_else(|e| panic!("{e}"));
    workload.answer().unwrap_or_else(|e| panic!("{e}"));
    bencher.bench_local(|| workload.run().unwrap_or_else(|e| panic!("{e}")));
}

/// One benchmark a group, its cases as arguments.
macro_rules! groups {
    ($($name:ident: $group:expr, $samples:expr;)*) => {
        $(
            #[divan::bench(args = of($group), sample_count = $samples, sample_size = 1)]
            fn $name(bencher: Bencher, case: &Named) {
                run(bencher, &case.0);
            }
        )*
    };
}

groups! {
    conv_stem: Group::ConvStem, 10;
    conv_dense: Group::ConvDense, 10;
    conv_depthwise: Group::ConvDepthwise, 10;
    op: Group::Op, 20;
    csc: Group::Csc, 3;
    loss: Group::Loss, 20;
    relations: Group::Relations, 3;
    train: Group::Train, 3;
    inference: Group::Inference, 5;
}
