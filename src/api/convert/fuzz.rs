//! Reads any bytes as a request and converts it, as a call's handler would: what the fuzzer runs (`fuzz/targets.rs`).

use prost::Message;

use super::{List, UploadEncoding, display_name, generate_spec, job_spec, messages, name, policy_owner, request_id};
use super::{score_spec, tenant_change};
use crate::api::proto as pb;
use crate::config::Limits;
use crate::error::Result;
use crate::ids::{AdapterName, DatasetName, VersionName};

/// Decodes `bytes` as the request that `which` picks, converts it, and returns whether that was possible.
pub fn convert_bytes(which: u8, bytes: &[u8], limits: &Limits) -> bool {
    convert(which, bytes, limits).is_ok()
}

/// Decodes a message, or takes an empty one where the bytes are none: its conversion must not panic either.
fn decode<M: Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).unwrap_or_default()
}

fn convert(which: u8, bytes: &[u8], limits: &Limits) -> Result<()> {
    match which % 10 {
        0 => drop(generate_spec(decode(bytes), (None, None), limits)?),
        1 => drop(score_spec(decode(bytes), (None, None))?),
        2 => {
            let request: pb::TrainRequest = decode(bytes);
            drop(job_spec(&request, Some(name("name", "tenants/t/adapters/a/versions/1")?))?);
            drop(job_spec(&request, None)?);
        }
        3 => {
            let request: pb::UpdateTenantRequest = decode(bytes);
            drop(tenant_change(request.tenant.unwrap_or_default(), request.update_mask)?);
        }
        4 => {
            let request: pb::ListAdaptersRequest = decode(bytes);
            drop(List::of("adapters", request.parent).page(request.page_size, request.page_token)?);
        }
        5 => {
            let (mut form, pair) = (UploadEncoding::default(), decode(bytes));
            drop(form.record(pair)?.to_line());
        }
        6 => drop(messages("chat", decode(bytes))?),
        7 => {
            let request: pb::UpdateSafetyPolicyRequest = decode(bytes);
            drop(policy_owner("name", &request.safety_policy.unwrap_or_default().name)?);
        }
        8 => {
            let request: pb::GetAdapterRequest = decode(bytes);
            let _ = name::<VersionName>("name", &request.name);
            let _ = name::<DatasetName>("name", &request.name);
            drop(name::<AdapterName>("name", &request.name)?);
        }
        _ => {
            let text = String::from_utf8_lossy(bytes).into_owned();
            drop(display_name(text.clone())?);
            drop(request_id(text)?);
        }
    }
    Ok(())
}
