//! Attacks on the memory and the places of the built program, on the real base: what a stranger, and a tenant with a key, can make it hold.
//! Prints the resident memory above idle, which must stay below a gigabyte, of strangers below a quarter of it, and after each attack a
//! client that holds nothing is served.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]
#![cfg(target_os = "linux")]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use prost::Message as _;
use tempfile::TempDir;
use tenora::api::client::{Client, Target};
use tenora::api::proto::*;
use tenora::hub::{CONFIG_FILE, TENSORS_FILE};
use tokio::net::TcpStream;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_prost::ProstCodec;

/// Most that the attacks of tenants may add, and those of strangers.
const BOUND: u64 = 1 << 30;
const STRANGERS_BOUND: u64 = 256 << 20;
/// How long each attack goes on.
const TIME: Duration = Duration::from_secs(12);
const TENANTS: usize = 4;

struct Server {
    process: Child,
    address: String,
    operator: String,
    data: TempDir,
}

impl Server {
    fn start() -> Self {
        let base = || tenora::bases::resolve(tenora::bases::DEFAULT, |_| {}).expect("the default base can be fetched");
        let base = std::thread::spawn(base).join().expect("fetched");
        let data = TempDir::new().expect("a folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tenora"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--threads", "2", "--data-dir"]).arg(data.path());
        command.arg("--base").arg(base).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().expect("the program starts");
        let (mut address, mut operator) = (String::new(), String::new());
        let mut lines = BufReader::new(process.stdout.take().expect("its output")).lines();
        while address.is_empty() {
            let line = lines.next().expect("it listens").expect("a line");
            address = line.strip_prefix("listening on ").unwrap_or_default().to_owned();
            operator = line.split_whitespace().find(|word| word.starts_with("tnr_")).map_or(operator, String::from);
        }
        Self { process, address, operator, data }
    }

    async fn client(&self, key: &str) -> Client {
        let target = Target { server: self.address.clone(), key: Some(key.to_owned()), tls_ca: None };
        Client::connect(&target).await.expect("a connection")
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(self.address.clone()).expect("an address").connect().await.expect("a connection")
    }

    async fn tenant(&self, id: &str) -> String {
        let operator = self.client(&self.operator).await;
        let create = CreateTenantRequest { tenant_id: id.into(), ..Default::default() };
        operator.create_tenant(create).await.expect("a tenant");
        let request = CreateApiKeyRequest { parent: format!("tenants/{id}"), ..Default::default() };
        operator.create_api_key(request).await.expect("a key").secret
    }

    /// Bytes in memory.
    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("it lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn keyed<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value: MetadataValue<Ascii> = format!("Bearer {key}").parse().expect("a header");
    request.metadata_mut().insert("authorization", value);
    request
}

fn chat_of_empty_messages() -> GenerateRequest {
    let chat = Chat { messages: vec![ChatMessage::default(); 900_000] };
    let request = GenerateRequest { prompt: Some(generate_request::Prompt::Chat(chat)), ..Default::default() };
    assert!(request.encoded_len() < 2 << 20);
    request
}

fn long_answer(logprobs: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(generate_request::Prompt::Text("Count for ever.".into())),
        stopping: Some(Stopping { max_tokens: Some(8000), ignore_eos: true, ..Default::default() }),
        logprobs: Some(logprobs),
        ..Default::default()
    }
}

/// Does something again and again until the time is over, so many at once.
async fn repeat<F: Future<Output = ()> + Send + 'static>(at_once: usize, work: impl Fn(usize) -> F + Send + Sync) {
    let until = Instant::now() + TIME;
    let turns = futures::stream::iter(0..).take_while(|_| async move { Instant::now() < until });
    turns.for_each_concurrent(at_once, |n| tokio::time::timeout_at(until.into(), work(n)).map_drop()).await;
}

trait MapDrop: Future + Sized {
    fn map_drop(self) -> impl Future<Output = ()> {
        async {
            drop(self.await);
        }
    }
}
impl<F: Future> MapDrop for F {}

/// Messages that are two bytes on the wire and fifty in memory.
async fn amplified(server: &Server, keys: &[String]) {
    let channel = server.channel().await;
    let request = chat_of_empty_messages();
    repeat(64, |n| {
        let (mut client, key, request) = (
            generation_service_client::GenerationServiceClient::new(channel.clone()),
            keys[n % keys.len()].clone(),
            request.clone(),
        );
        async move { drop(client.generate(keyed(request, &key)).await) }
    })
    .await;
}

/// Imports of 90 MB whose header promises everything.
async fn imports(server: &Server, keys: &[String]) {
    let mut tensors = (8u64 << 20).to_le_bytes().to_vec();
    tensors.extend(br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#);
    tensors.resize(90 << 20, b' ');
    let config = br#"{"peft_type":"LORA","r":8,"lora_alpha":8,"target_modules":["q_proj"],"task_type":"CAUSAL_LM"}"#;
    let tensors = std::sync::Arc::new(tensors);
    let channels = [server.channel().await, server.channel().await];
    repeat(16, |n| {
        let (key, tensors) = (keys[n % keys.len()].clone(), tensors.clone());
        let parent = format!("tenants/t{}", n % keys.len());
        let mut client = adapter_service_client::AdapterServiceClient::new(channels[n % 2].clone());
        let header = ImportAdapterHeader { parent, adapter_id: format!("x{n}"), ..Default::default() };
        let part = |part| ImportAdapterRequest { part: Some(part) };
        let file = move |filename: &str, data: &[u8]| {
            part(import_adapter_request::Part::Chunk(FileChunk { filename: filename.into(), data: data.into() }))
        };
        let begin = [part(import_adapter_request::Part::Header(header)), file(CONFIG_FILE, config)];
        let chunks = (0..90usize).map(move |i| file(TENSORS_FILE, &tensors[i << 20..(i + 1) << 20]));
        let messages = futures::stream::iter(begin.into_iter().chain(chunks));
        async move { drop(client.import_adapter(keyed(messages, &key)).await) }
    })
    .await;
}

/// Answers with all their log-probabilities, of which nobody reads a byte.
async fn unread(server: &Server, keys: &[String]) {
    let mut held = Vec::new();
    for key in keys {
        let channel = server.channel().await;
        for _ in 0..250 {
            let mut client = generation_service_client::GenerationServiceClient::new(channel.clone());
            if let Ok(stream) = client.generate(keyed(long_answer(20), key)).await {
                held.push(stream);
            }
        }
    }
    tokio::time::sleep(TIME).await;
}

/// Many connections, silent or with half a request on each of their streams.
async fn connections(server: &Server, keys: &[String]) {
    let address = server.address.trim_start_matches("http://").to_owned();
    let mut silent = Vec::new();
    for _ in 0..2000 {
        silent.extend(TcpStream::connect(&address).await);
    }
    let mut held = Vec::new();
    for n in 0..32 {
        let channel = server.channel().await;
        for _ in 0..32 {
            let mut client = dataset_service_client::DatasetServiceClient::new(channel.clone());
            let key = keys[n % keys.len()].clone();
            let data = upload_dataset_request::Part::Data(vec![b' '; 1 << 20]);
            let first = UploadDatasetRequest { part: Some(data) };
            let messages = futures::stream::iter([first]).chain(futures::stream::pending());
            held.push(tokio::spawn(async move { drop(client.upload_dataset(keyed(messages, &key)).await) }));
        }
    }
    tokio::time::sleep(TIME).await;
    held.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Questions about health that are never asked to their end, without a key, with headers as long as may be.
async fn strangers(server: &Server, _: &[String]) {
    let mut held = Vec::new();
    for _ in 0..100 {
        let channel = server.channel().await;
        for _ in 0..250 {
            let mut client = Grpc::new(channel.clone());
            let mut request = Request::new(futures::stream::pending());
            request.metadata_mut().insert("x-long", "x".repeat(7000).parse().expect("a header"));
            let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
            let codec: ProstCodec<HealthCheckRequest, HealthCheckResponse> = ProstCodec::default();
            held.push(tokio::spawn(async move {
                client.ready().await.expect("a connection");
                drop(client.client_streaming(request, path, codec).await);
            }));
        }
    }
    tokio::time::sleep(TIME).await;
    held.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Datasets that are read whole at once.
async fn reads(server: &Server, keys: &[String]) {
    let line = "{\"prompt\":\"How are you?\",\"completion\":\"Fine, thank you, and you?\"}\n";
    for (i, key) in keys.iter().enumerate() {
        let header = UploadHeader { parent: format!("tenants/t{i}"), dataset_id: "d".into(), ..Default::default() };
        let part = |part| UploadDatasetRequest { part: Some(part) };
        let data = line.repeat((1 << 20) / line.len()).into_bytes();
        let pieces = (0..60).map(move |_| part(upload_dataset_request::Part::Data(data.clone())));
        let messages = std::iter::once(part(upload_dataset_request::Part::Header(header))).chain(pieces);
        let mut client = dataset_service_client::DatasetServiceClient::new(server.channel().await);
        client.upload_dataset(keyed(futures::stream::iter(messages), key)).await.expect("a dataset of 60 MB");
    }
    let channel = server.channel().await;
    repeat(64, |n| {
        let mut client = dataset_service_client::DatasetServiceClient::new(channel.clone());
        let request =
            InspectDatasetRequest { name: format!("tenants/t{}/datasets/d", n % keys.len()), ..Default::default() };
        let key = keys[n % keys.len()].clone();
        async move { drop(client.inspect_dataset(keyed(request, &key)).await) }
    })
    .await;
}

async fn served(server: &Server, key: &str) {
    let mut client = generation_service_client::GenerationServiceClient::new(server.channel().await);
    let request = GenerateRequest {
        prompt: Some(generate_request::Prompt::Text("Hello".into())),
        stopping: Some(Stopping { max_tokens: Some(4), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let asked = async {
        let mut messages = client.generate(keyed(request, key)).await.expect("an answer").into_inner();
        while let Some(message) = messages.next().await {
            message.expect("a message");
        }
    };
    tokio::time::timeout(Duration::from_secs(60), asked).await.expect("whoever holds nothing is served");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_attack_makes_the_server_hold_more_than_it_may() {
    let server = Server::start();
    let mut keys = Vec::new();
    for i in 0..TENANTS {
        keys.push(server.tenant(&format!("t{i}")).await);
    }
    let bystander = server.tenant("bystander").await;
    served(&server, &bystander).await;
    let idle = server.resident();
    let mut failed = Vec::new();
    macro_rules! attack {
        ($attack:ident, $bound:expr) => {
            let mut most = 0;
            let attack = async {
                let attack = $attack(&server, &keys);
                tokio::pin!(attack);
                loop {
                    tokio::select! {
                        () = &mut attack => break,
                        () = tokio::time::sleep(Duration::from_millis(20)) => most = most.max(server.resident()),
                    }
                }
            };
            let (bystand, ()) = tokio::join!(
                async {
                    tokio::time::sleep(TIME / 2).await;
                    served(&server, &bystander).await
                },
                attack
            );
            let () = bystand;
            let above = |bytes: u64| bytes.saturating_sub(idle) >> 20;
            let mut after = server.resident();
            for _ in 0..40 {
                if above(after) < 128 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
                after = server.resident();
            }
            println!(
                "{:<12} at most {:>5} MiB above idle, {:>4} MiB afterwards",
                stringify!($attack),
                above(most),
                above(after)
            );
            if most.saturating_sub(idle) > $bound {
                failed.push(stringify!($attack));
            }
        };
    }
    println!("idle: {} MiB, data in {}", idle >> 20, server.data.path().display());
    attack!(strangers, STRANGERS_BOUND);
    attack!(amplified, BOUND);
    attack!(imports, BOUND);
    attack!(unread, BOUND);
    attack!(connections, BOUND);
    attack!(reads, BOUND);
    served(&server, &bystander).await;
    assert!(failed.is_empty(), "{failed:?} held more than they may");
}
