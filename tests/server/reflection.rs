//! Every method as the server itself describes it over reflection, and requests filled with names, so that a method added later is
//! tested without a change here.

use std::collections::BTreeMap;

use prost::Message as _;
use prost::bytes::{Buf as _, BufMut as _};
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Request, Status};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::common::Transport;

/// A method and where its request carries resource names.
#[derive(Debug, Clone)]
pub struct Method {
    /// `/package.Service/Method`.
    pub path: String,
    request: String,
}

/// What the server says it serves.
pub struct Api {
    pub methods: Vec<Method>,
    /// By full name: the fields, each with the form of name that its comment begins with.
    messages: BTreeMap<String, Vec<(FieldDescriptorProto, Option<String>)>>,
}

impl Api {
    /// Asks the reflection service for everything.
    pub async fn discover(transport: Transport) -> Self {
        let mut client = ServerReflectionClient::new(transport);
        let mut api = Self { methods: Vec::new(), messages: BTreeMap::new() };
        let MessageResponse::ListServicesResponse(services) =
            ask(&mut client, MessageRequest::ListServices(String::new())).await
        else {
            panic!("no list of services");
        };
        for service in services.service {
            let symbol = MessageRequest::FileContainingSymbol(service.name);
            let MessageResponse::FileDescriptorResponse(files) = ask(&mut client, symbol).await else {
                panic!("no file");
            };
            for file in files.file_descriptor_proto {
                api.read(&FileDescriptorProto::decode(file.as_slice()).unwrap());
            }
        }
        api.methods.sort_by(|a, b| a.path.cmp(&b.path));
        api
    }

    fn read(&mut self, file: &FileDescriptorProto) {
        for service in &file.service {
            self.methods.extend(service.method.iter().map(|method| Method {
                path: format!("/{}.{}/{}", file.package(), service.name(), method.name()),
                request: method.input_type().trim_start_matches('.').to_owned(),
            }));
        }
        for (i, message) in file.message_type.iter().enumerate() {
            let fields = message.field.iter().enumerate();
            let fields = fields.map(|(j, field)| (field.clone(), form(file, message, i, j))).collect();
            self.messages.insert(format!("{}.{}", file.package(), message.name()), fields);
        }
    }

    /// An encoded request in which every field whose comment gives a form of name has that name, with `{t}`, `{a}` and so on
    /// replaced; nothing else is set. `None` where the request has no such field.
    pub fn request(&self, method: &Method, ids: &[(&str, &str)]) -> Option<Vec<u8>> {
        let bytes = self.fill(&method.request, ids);
        (!bytes.is_empty()).then_some(bytes)
    }

    fn fill(&self, message: &str, ids: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (field, form) in self.messages.get(message).into_iter().flatten() {
            let value = match (field.r#type(), form) {
                (Type::String, Some(form)) => {
                    ids.iter().fold(form.clone(), |name, (id, value)| name.replace(id, value)).into_bytes()
                }
                (Type::Message, _) => self.fill(field.type_name().trim_start_matches('.'), ids),
                _ => continue,
            };
            if !value.is_empty() {
                prost::encoding::bytes::encode(field.number() as u32, &value, &mut bytes);
            }
        }
        bytes
    }
}

/// "`tenants/{t}/adapters/{a}`" at the start of a field's comment.
fn form(file: &FileDescriptorProto, message: &DescriptorProto, i: usize, j: usize) -> Option<String> {
    // Two resources are sent whole to be updated.
    let name = message.name();
    if !name.ends_with("Request") && !name.ends_with("Header") && !["SafetyPolicy", "Tenant"].contains(&name) {
        return None;
    }
    let path = [4, i as i32, 2, j as i32];
    let places = &file.source_code_info.as_ref()?.location;
    let comment = places.iter().find(|place| place.path == path)?.leading_comments();
    let form = comment.trim().strip_prefix('`')?.split_once('`')?.0;
    form.starts_with("tenants/").then(|| form.to_owned())
}

async fn ask(client: &mut ServerReflectionClient<Transport>, request: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let answers = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
    answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
}

/// Calls any method with one encoded message; gives the first answer, where there is one.
pub async fn call(transport: Transport, path: &str, message: Vec<u8>) -> Result<Option<Vec<u8>>, Status> {
    let mut grpc = Grpc::new(transport);
    grpc.ready().await.unwrap();
    let path: PathAndQuery = path.parse().unwrap();
    let request = Request::new(futures::stream::iter([message]));
    grpc.streaming(request, path, Raw).await?.into_inner().message().await
}

/// Messages as bytes.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}
