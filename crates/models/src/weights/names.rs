//! Names of one library turned into those of another: patterns, both ways.
//!
//! A pattern is a tensor name with places: `{i}` stands for a number, `{p}` for a part without a dot, `{rest}` for whatever
//! follows. A rule is a pair of patterns with the same places; it reads a name there and writes it here, or the reverse.

use std::fmt::Write;

/// One piece of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Place(String),
}

/// A tensor name with places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern(Vec<Piece>);

/// What stood at the places of a pattern, by their names.
pub(super) type Filled<'a> = Vec<(&'a str, &'a str)>;

impl Pattern {
    /// Reads a pattern.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (place, after) =
                after.split_once('}').ok_or_else(|| format!("`{text}` opens a brace it does not close"))?;
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_string()));
            }
            if place == "rest" && !after.is_empty() {
                return Err(format!("`{text}` goes on after {{rest}}"));
            }
            if pieces.contains(&Piece::Place(place.to_string())) {
                return Err(format!("`{text}` has {{{place}}} twice"));
            }
            pieces.push(Piece::Place(place.to_string()));
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_string()));
        }
        Ok(Self(pieces))
    }

    /// The same pattern behind a prefix.
    pub(super) fn below(&self, prefix: &str) -> Self {
        let mut pieces = self.0.clone();
        if prefix.is_empty() {
            return Self(pieces);
        }
        match pieces.first_mut() {
            Some(Piece::Text(text)) => text.insert_str(0, prefix),
            _ => pieces.insert(0, Piece::Text(prefix.to_string())),
        }
        Self(pieces)
    }

    /// Names of its places, sorted.
    pub(super) fn places(&self) -> Vec<&str> {
        let mut out: Vec<&str> =
            self.0.iter().filter_map(|p| if let Piece::Place(name) = p { Some(name.as_str()) } else { None }).collect();
        out.sort_unstable();
        out
    }

    /// What stands at the places of `name`, if it is of this pattern.
    pub(super) fn read<'a>(&'a self, name: &'a str) -> Option<Filled<'a>> {
        let mut filled = Filled::new();
        let mut rest = name;
        for piece in &self.0 {
            let place = match piece {
                Piece::Text(text) => {
                    rest = rest.strip_prefix(text.as_str())?;
                    continue;
                }
                Piece::Place(place) => place.as_str(),
            };
            let len = match place {
                "rest" => rest.len(),
                // A number is told by its name: one letter from i to n.
                "i" | "j" | "k" | "l" | "m" | "n" => rest.bytes().take_while(u8::is_ascii_digit).count(),
                _ => rest.find('.').unwrap_or(rest.len()),
            };
            if len == 0 {
                return None;
            }
            let (value, after) = rest.split_at(len);
            filled.push((place, value));
            rest = after;
        }
        rest.is_empty().then_some(filled)
    }

    /// The name with these values at its places.
    pub(super) fn write(&self, filled: &Filled) -> String {
        let mut out = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Place(place) => {
                    let value = filled.iter().find(|(name, _)| name == place).map_or("", |(_, value)| *value);
                    let _ = write!(out, "{value}");
                }
            }
        }
        out
    }
}

/// Names there, one or several that are joined along their first dimension, and the name here.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) there: Vec<Pattern>,
    pub(super) here: Pattern,
}

impl Rule {
    /// A rule, checked to be readable both ways.
    pub(super) fn new(there: Vec<Pattern>, here: Pattern) -> Result<Self, String> {
        if there.is_empty() || there.iter().any(|pattern| pattern.places() != here.places()) {
            return Err(format!("a rule for `{}` has other places on its two sides", here.write(&Filled::new())));
        }
        Ok(Self { there, here })
    }

    /// The name here of a name there, and which of the joined parts it is.
    pub(super) fn to_here(&self, name: &str) -> Option<(String, usize)> {
        self.there.iter().enumerate().find_map(|(part, there)| Some((self.here.write(&there.read(name)?), part)))
    }

    /// The names there of a name here.
    pub(super) fn to_there(&self, name: &str) -> Option<Vec<String>> {
        let filled = self.here.read(name)?;
        Some(self.there.iter().map(|there| there.write(&filled)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(there: &[&str], here: &str) -> Rule {
        Rule::new(there.iter().map(|t| Pattern::parse(t).unwrap()).collect(), Pattern::parse(here).unwrap()).unwrap()
    }

    #[test]
    fn a_rule_reads_and_writes_the_same_names() {
        let r = rule(&["model.stem_{i}.{rest}"], "stem.{i}.{rest}");
        assert_eq!(r.to_here("model.stem_10.conv.weight"), Some(("stem.10.conv.weight".into(), 0)));
        assert_eq!(r.to_there("stem.10.conv.weight"), Some(vec!["model.stem_10.conv.weight".into()]));
        for other in ["model.stem_.conv", "model.stem_1", "model.stem_x.conv", "stem.1.conv", "xmodel.stem_1.a", ""] {
            assert_eq!(r.to_here(other), None, "{other}");
        }
    }

    #[test]
    fn places_end_where_they_should() {
        let r = rule(&["block{i}.{j}.attn.{p}"], "b.{j}.{i}.{p}");
        assert_eq!(r.to_here("block1.12.attn.weight"), Some(("b.12.1.weight".into(), 0)));
        assert_eq!(r.to_here("block1.12.attn.q.weight"), None);
        assert_eq!(rule(&["{rest}"], "encoder.{rest}").to_here("conv1.weight").unwrap().0, "encoder.conv1.weight");
        assert_eq!(rule(&["fixed"], "other").to_here("fixed"), Some(("other".into(), 0)));
        assert_eq!(rule(&["fixed"], "other").to_here("fixed.x"), None);
    }

    #[test]
    fn joined_names_know_their_part() {
        let r = rule(&["{i}.key.{p}", "{i}.value.{p}"], "{i}.kv.{p}");
        assert_eq!(r.to_here("3.value.bias"), Some(("3.kv.bias".into(), 1)));
        assert_eq!(r.to_there("3.kv.bias").unwrap(), ["3.key.bias", "3.value.bias"]);
    }

    #[test]
    fn what_cannot_be_read_back_is_no_rule() {
        let two = |a, b| Rule::new(vec![Pattern::parse(a).unwrap()], Pattern::parse(b).unwrap());
        assert!(two("a.{i}.{p}", "b.{i}").is_err());
        assert!(two("a", "b.{i}").is_err());
        for bad in ["a.{i", "a.{rest}.b", "{i}.{i}"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_prefix_goes_before_text_and_places() {
        assert_eq!(Pattern::parse("a.{i}").unwrap().below("x."), Pattern::parse("x.a.{i}").unwrap());
        assert_eq!(Pattern::parse("{rest}").unwrap().below("x."), Pattern::parse("x.{rest}").unwrap());
        assert_eq!(Pattern::parse("{rest}").unwrap().below(""), Pattern::parse("{rest}").unwrap());
    }
}
