//! Tokens of pages: a key of the store's, sealed with the list that it belongs to, so that a token of another list is an error and no
//! other page.

use std::fmt::Display;

use crate::error::{Error, Result};
use crate::store::Page;

/// A list that is read page by page, such as the datasets of one tenant.
#[derive(Debug, Clone, Copy)]
pub struct List(u32);

impl List {
    /// The list of what `kind` names below `parent`.
    pub fn of(kind: &str, parent: impl Display) -> Self {
        Self(crc32fast::hash(format!("{kind} of {parent}").as_bytes()))
    }

    /// Reads what a request says about its page.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for a negative size, and a token that is not of this list.
    pub fn page(self, size: i32, token: String) -> Result<Page> {
        let size = u32::try_from(size).map_err(|_| Error::invalid("page_size", "must not be negative"))?;
        if token.is_empty() {
            return Ok(Page { size, token });
        }
        let key = token.split_once('.').filter(|(seal, _)| *seal == self.seal()).map(|(_, key)| key.to_owned());
        let foreign = "must be the next_page_token of the page before, of the same list";
        Ok(Page { size, token: key.ok_or_else(|| Error::invalid("page_token", foreign))? })
    }

    /// Returns the token of the page that begins after the store's `key`; empty after the last page.
    pub fn token(self, key: &str) -> String {
        if key.is_empty() { String::new() } else { format!("{}.{key}", self.seal()) }
    }

    fn seal(self) -> String {
        format!("{:08x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_belongs_to_its_list() {
        let list = List::of("datasets", "tenants/a");
        assert!(list.page(-1, String::new()).is_err());
        assert_eq!(list.page(7, String::new()).unwrap(), Page { size: 7, token: String::new() });
        assert_eq!(list.page(0, list.token("a.b")).unwrap().token, "a.b");
        assert_eq!(list.token(""), "");
        for other in [List::of("adapters", "tenants/a"), List::of("datasets", "tenants/b")] {
            let error = other.page(0, list.token("x")).unwrap_err();
            assert!(matches!(&error, Error::Invalid { field, .. } if field == "page_token"), "{error:?}");
        }
        for wrong in ["x", ".", "00000000.x"] {
            assert!(list.page(0, wrong.into()).is_err(), "{wrong:?}");
        }
    }
}
