//! Classes by name and colour, and the one place that says what void is.

use crate::{LabelMap, RgbImage};

/// The id of pixels without a class, in every label map after loading.
pub const VOID: u8 = 255;

/// One class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Name as the data set writes it.
    pub name: String,
    /// Colour in pictures for people.
    pub color: [u8; 3],
}

/// The classes of a data set; a class's id is its place in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassTable {
    /// Data set the table belongs to.
    pub name: String,
    /// Classes by id.
    pub classes: Vec<Class>,
    /// Colour of void pixels.
    pub void_color: [u8; 3],
}

impl ClassTable {
    /// Number of classes, void not counted.
    pub fn n_classes(&self) -> usize {
        self.classes.len()
    }

    /// Id of the class called `name`, exactly as written in the table.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.classes.iter().position(|c| c.name == name)
    }

    /// The label map as a picture: each class in its colour, void and ids outside the table in the colour of void.
    pub fn colorize(&self, labels: &LabelMap) -> RgbImage {
        let color = |id: &u8| self.classes.get(usize::from(*id)).map_or(self.void_color, |c| c.color);
        RgbImage { height: labels.height, width: labels.width, rgb: labels.ids.iter().flat_map(color).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_colours_are_found_by_id() {
        let class = |name: &str, color| Class { name: name.into(), color };
        let table = ClassTable {
            name: "two".into(),
            classes: vec![class("Sky", [1, 2, 3]), class("Road", [4, 5, 6])],
            void_color: [9, 9, 9],
        };
        assert_eq!((table.n_classes(), table.index_of("Road"), table.index_of("road")), (2, Some(1), None));
        let labels = LabelMap { height: 1, width: 3, ids: vec![1, VOID, 0] };
        assert_eq!(table.colorize(&labels).rgb, [4, 5, 6, 9, 9, 9, 1, 2, 3]);
    }
}
