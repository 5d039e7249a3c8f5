//! Class weights from how frequent the classes are.

/// ENet's class weights: `1 / ln(1.02 + p)` for a class of share `p`.
///
/// They lie between 1.42 for a class that fills every image and 50.5 for one that never occurs: bounded, unlike inverse
/// frequencies. The median-frequency weights are `stats` of the data crate, as they need to know which images hold a
/// class.
///
/// `class_shares` are pixels of a class over the labelled pixels of the training set, each in [0, 1] (fractions, not
/// percent); a share that is NaN gives a weight that is NaN, which every loss refuses.
///
/// # Source
/// Paszke et al. 2016 (ENet), section 5.1.
/// # Example
/// ```
/// let weights = segdistill_losses::enet_weights(&[0.0, 0.1754, 1.0]);
/// assert!((weights[0] - 50.498).abs() < 1e-3 && (weights[1] - 5.60).abs() < 5e-3 && weights[2] < 1.43);
/// ```
pub fn enet_weights(class_shares: &[f64]) -> Vec<f64> {
    class_shares.iter().map(|share| 1.0 / (1.02 + share).ln()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares and weights of CamVid's 11 classes, computed apart from this program.
    #[test]
    fn camvid() {
        let percent = [17.54, 24.22, 1.02, 32.96, 4.67, 10.12, 1.22, 1.17, 6.11, 0.67, 0.30];
        let expected = [5.60, 4.30, 33.6, 3.34, 15.5, 8.74, 31.5, 32.0, 12.8, 38.0, 43.9];
        for (weight, expected) in enet_weights(&percent.map(|p| p / 100.0)).iter().zip(expected) {
            assert!((weight / expected - 1.0).abs() < 3e-3, "{weight}, {expected}");
        }
    }
}
