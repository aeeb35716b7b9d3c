//! The methods that can be called with a key, as the descriptors name them.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

use prost::Message as _;
use prost_types::{FileDescriptorSet, MethodDescriptorProto};

use super::proto;

/// What the services of this server are called.
pub const OURS: &str = "/tenora.v1.";

/// What the methods that change nothing begin with.
const READING: [&str; 7] = ["Get", "List", "Inspect", "Check", "Score", "Tokenize", "Detokenize"];

/// Which sides of a method send a stream of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    pub client: bool,
    pub server: bool,
}

/// All methods by their paths.
pub static METHODS: LazyLock<HashMap<String, Streams>> = LazyLock::new(|| {
    use tonic_reflection::pb::{v1, v1alpha};
    let sets = [proto::DESCRIPTORS, v1::FILE_DESCRIPTOR_SET, v1alpha::FILE_DESCRIPTOR_SET];
    let sets = sets.map(|bytes| FileDescriptorSet::decode(bytes).unwrap_or_default());
    let mut methods = HashMap::new();
    for file in sets.iter().flat_map(|set| &set.file) {
        for service in &file.service {
            let name = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
            let streams = |method: &MethodDescriptorProto| Streams {
                client: method.client_streaming(),
                server: method.server_streaming(),
            };
            methods.extend(service.method.iter().map(|method| (name(method.name()), streams(method))));
        }
    }
    methods
});

/// The names of this server's own services.
pub fn services() -> BTreeSet<&'static str> {
    let ours = METHODS.keys().filter(|path| path.starts_with(OURS));
    ours.filter_map(|path| path[1..].split_once('/')).map(|(service, _)| service).collect()
}

/// Whether a method is known to change nothing, so that its answer may be refused after it has run.
pub fn only_reads(path: &str) -> bool {
    let method = path.strip_prefix(OURS).and_then(|rest| rest.split_once('/'));
    method.is_some_and(|(_, method)| READING.iter().any(|verb| method.starts_with(verb)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_methods_that_exist_are_known() {
        let streams = |path| METHODS.get(path).map(|streams| (streams.client, streams.server));
        assert_eq!(streams("/tenora.v1.GenerationService/Generate"), Some((false, true)));
        assert_eq!(streams("/tenora.v1.DatasetService/UploadDataset"), Some((true, false)));
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        assert_eq!(streams(reflection), Some((true, true)));
        assert!(METHODS.contains_key("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"));
        assert_eq!(streams("/tenora.v1.GenerationService/Other"), None);
        assert_eq!(services().len(), 7);
        assert!(services().contains("tenora.v1.GenerationService"));
    }

    /// Whoever adds a method decides here whether its answer may be refused.
    #[test]
    fn what_changes_something_is_never_taken_for_reading() {
        let one_message = METHODS.iter().filter(|(path, streams)| path.starts_with(OURS) && !streams.server);
        let (reads, writes): (BTreeSet<&str>, _) = one_message
            .map(|(path, _)| path.rsplit('/').next().unwrap())
            .partition(|method| only_reads(METHODS.keys().find(|path| path.ends_with(&format!("/{method}"))).unwrap()));
        let expected = [
            "CancelTrainingJob",
            "CreateApiKey",
            "CreateTenant",
            "DeleteAdapter",
            "DeleteDataset",
            "DeleteTenant",
            "DeleteTrainingJob",
            "ImportAdapter",
            "ResumeTrainingJob",
            "RevokeApiKey",
            "SetLiveVersion",
            "Train",
            "UpdateSafetyPolicy",
            "UpdateTenant",
            "UploadDataset",
            "UploadPreferences",
        ];
        assert_eq!(writes, BTreeSet::from(expected));
        assert_eq!(reads.len(), 18, "{reads:?}");
    }
}
