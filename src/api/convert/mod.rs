//! Between protobuf messages and the crate's own types. Errors name the field by its path in the message.

mod fuzz;
mod generation;
mod pages;
mod pairs;
mod rows;
mod training;

use std::str::FromStr;
use std::time::SystemTime;

use prost_types::{FieldMask, Timestamp};

pub use fuzz::convert_bytes;
pub use generation::{generate_spec, response_of, score_response, score_spec, token, tokenize_input};
pub use pages::List;
pub use pairs::UploadEncoding;
pub use rows::*;
pub use training::{event, job, job_spec, model_format, train_key, validated};

use crate::api::proto as pb;
use crate::error::{Error, Result};
use crate::ids::{AdapterRef, TenantId};
use crate::request::{ChatMessage, Publish};
use crate::store::TenantChange;

/// Longest name for people. Bytes.
const MAX_DISPLAY_NAME: usize = 256;
/// Longest request id. Bytes.
const MAX_REQUEST_ID: usize = 128;
/// Heaviest tenant.
const MAX_WEIGHT: u32 = 1000;

/// Parses a name; errors name `field`.
pub fn name<T: FromStr<Err = Error>>(field: &str, text: &str) -> Result<T> {
    text.parse().map_err(|error| at(field, error))
}

/// Moves an error about a part of a message to the field's whole path.
pub fn at(field: &str, error: Error) -> Error {
    match error {
        Error::Invalid { reason, message, field: _ } => Error::Invalid { reason, field: field.to_owned(), message },
        other => other,
    }
}

/// `tenants/{t}/safetyPolicy`.
pub fn policy_owner(field: &str, text: &str) -> Result<TenantId> {
    let form = || Error::invalid_because("INVALID_NAME", field, "must be of the form tenants/{tenant}/safetyPolicy");
    text.strip_suffix("/safetyPolicy").ok_or_else(form)?.parse().map_err(|_| form())
}

/// Empty is the base.
fn adapter(field: &str, text: &str) -> Result<Option<AdapterRef>> {
    if text.is_empty() { Ok(None) } else { name(field, text).map(Some) }
}

pub fn display_name(text: String) -> Result<String> {
    at_most("display_name", text, MAX_DISPLAY_NAME)
}

/// A tenant's weight.
pub fn weight(field: &str, weight: u32) -> Result<u32> {
    match weight {
        1..=MAX_WEIGHT => Ok(weight),
        _ => Err(Error::invalid(field, format!("must be 1 to {MAX_WEIGHT}"))),
    }
}

/// What an update changes of a tenant.
pub fn tenant_change(tenant: pb::Tenant, mask: Option<FieldMask>) -> Result<TenantChange> {
    let named = mask.map(|mask| mask.paths).filter(|paths| !paths.is_empty());
    let paths = named.unwrap_or_else(|| ["display_name", "weight"].map(Into::into).into());
    let mut change = TenantChange::default();
    for path in paths {
        match path.as_str() {
            "display_name" => change.display_name = Some(display_name(tenant.display_name.clone())?),
            "weight" => change.weight = Some(weight("tenant.weight", tenant.weight)?),
            _ => return Err(Error::invalid("update_mask", "may hold display_name and weight")),
        }
    }
    Ok(change)
}

pub fn request_id(text: String) -> Result<String> {
    at_most("request_id", text, MAX_REQUEST_ID)
}

fn at_most(field: &str, text: String, bytes: usize) -> Result<String> {
    if text.len() <= bytes { Ok(text) } else { Err(Error::invalid(field, format!("must have at most {bytes} bytes"))) }
}

pub fn publish(value: i32) -> Result<Publish> {
    match known::<pb::Publish>("publish", value)? {
        pb::Publish::Unspecified => Ok(Publish::Auto),
        pb::Publish::Live => Ok(Publish::Live),
        pb::Publish::VersionOnly => Ok(Publish::VersionOnly),
    }
}

/// An enum's value that this server knows.
fn known<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T> {
    T::try_from(value).map_err(|_| Error::invalid(field, format!("has no value {value}")))
}

pub fn messages(field: &str, chat: pb::Chat) -> Result<Vec<ChatMessage>> {
    let check = |(i, message): (usize, pb::ChatMessage)| {
        let role = match message.role.as_str() {
            "developer" => "system",
            role @ ("system" | "user" | "assistant") => role,
            _ => {
                let message = "must be system (or developer), user or assistant";
                return Err(Error::invalid(format!("{field}.messages[{i}].role"), message));
            }
        };
        let name = Some(message.name).filter(|name| !name.is_empty());
        Ok(ChatMessage { name, ..ChatMessage::new(role, message.content) })
    };
    if chat.messages.is_empty() {
        return Err(Error::invalid(format!("{field}.messages"), "must have at least one message"));
    }
    chat.messages.into_iter().enumerate().map(check).collect()
}

pub fn timestamp(time: SystemTime) -> Option<Timestamp> {
    Some(time.into())
}

/// A name that may be absent; absent is empty.
fn or_empty(name: Option<impl ToString>) -> String {
    name.map(|name| name.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::AdapterName;

    #[test]
    fn an_update_changes_what_its_mask_names() {
        let tenant = || pb::Tenant { display_name: "A".into(), weight: 3, ..Default::default() };
        let mask = |path: &str| Some(FieldMask { paths: vec![path.into()] });
        let (display_name, weight) = (Some("A".to_owned()), Some(3));
        assert_eq!(tenant_change(tenant(), None).unwrap(), TenantChange { display_name: display_name.clone(), weight });
        assert_eq!(tenant_change(tenant(), mask("weight")).unwrap(), TenantChange { display_name: None, weight });
        assert_eq!(tenant_change(tenant(), mask("display_name")).unwrap(), TenantChange { display_name, weight: None });
        assert!(tenant_change(tenant(), mask("name")).is_err());
        for weight in [0, 1001] {
            assert!(tenant_change(pb::Tenant { weight, ..tenant() }, None).is_err());
        }
    }

    #[test]
    fn errors_name_the_field() {
        let error = name::<AdapterName>("from_version", "adapters/x").unwrap_err();
        assert!(matches!(error, Error::Invalid { field, .. } if field == "from_version"));
        let wrong_role = pb::Chat { messages: vec![pb::ChatMessage { role: "tool".into(), ..Default::default() }] };
        let error = messages("chat", wrong_role).unwrap_err();
        assert!(matches!(error, Error::Invalid { field, .. } if field == "chat.messages[0].role"));
    }

    #[test]
    fn a_policy_has_an_owner() {
        assert_eq!(policy_owner("name", "tenants/a/safetyPolicy").unwrap().as_str(), "a");
        for wrong in ["", "tenants/a", "tenants//safetyPolicy", "tenants/a/b/safetyPolicy"] {
            assert!(policy_owner("name", wrong).is_err(), "{wrong:?}");
        }
    }
}
