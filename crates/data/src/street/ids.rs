//! Ids of CamVid's classes, as `datasets/street-scenes.toml` orders them (a test compares the two).

pub(super) const SKY: u8 = 0;
pub(super) const BUILDING: u8 = 1;
pub(super) const POLE: u8 = 2;
pub(super) const ROAD: u8 = 3;
pub(super) const PAVEMENT: u8 = 4;
pub(super) const TREE: u8 = 5;
pub(super) const SIGN: u8 = 6;
pub(super) const FENCE: u8 = 7;
pub(super) const CAR: u8 = 8;
pub(super) const PEDESTRIAN: u8 = 9;
pub(super) const BICYCLIST: u8 = 10;

/// Each id with the name its class has in the manifest.
#[cfg(test)]
pub(super) const NAMES: [(u8, &str); 11] = [
    (SKY, "Sky"),
    (BUILDING, "Building"),
    (POLE, "Pole"),
    (ROAD, "Road"),
    (PAVEMENT, "Pavement"),
    (TREE, "Tree"),
    (SIGN, "SignSymbol"),
    (FENCE, "Fence"),
    (CAR, "Car"),
    (PEDESTRIAN, "Pedestrian"),
    (BICYCLIST, "Bicyclist"),
];
