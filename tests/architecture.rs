//! The import directions of ARCHITECTURE.md's map, the places that may make a `Tenant`, where `unsafe`, SQL and tonic may appear, and that the
//! reasons of errors are documented.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Importable by all; they import only each other.
const LEAVES: &[&str] = &[
    "error",
    "ids",
    "config",
    "telemetry",
    "device",
    "text",
    "request",
    "random",
    "bases",
    "process",
    "sync",
    "work",
    "memory",
];

/// What each module may import besides the leaves. `api/client.rs` is a module of its own: the command line's half of the wire.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("arch", &["kernels"]),
    ("weights", &["kernels", "arch"]),
    ("adapter", &["kernels", "arch"]),
    ("model", &["weights", "adapter", "arch", "kernels"]),
    ("store", &[]),
    ("hub", &["adapter", "store"]),
    ("data", &["store"]),
    ("engine", &["model", "adapter", "hub", "kernels"]),
    ("train", &["model", "adapter", "data", "hub", "store"]),
    ("safety", &["engine", "store"]),
    ("api", &["safety", "train", "data", "hub", "store", "adapter"]),
    ("api::client", &["api"]),
    // `models inspect` looks at a base that no server has loaded.
    ("cli", &["api::client", "api", "model", "weights"]),
];

/// Modules that stay free of the runtime.
const NO_TOKIO: &[&str] = &["kernels", "arch", "weights", "adapter", "model"];

/// Where the sources are, and the module that a folder's files belong to; `src` has one for each folder in it.
const PLACES: [(&str, Option<&str>); 3] =
    [("src", None), ("crates/kernels/src", Some("kernels")), ("crates/proto/src", Some("proto"))];

struct Source {
    path: PathBuf,
    module: String,
    /// The code without comments and tests.
    code: String,
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for (place, module) in PLACES {
        let mut files = Vec::new();
        collect(Path::new(place), &mut files);
        assert!(!files.is_empty(), "the sources are found");
        sources.extend(files.into_iter().map(|path| read(path, place, module)));
    }
    sources
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        match path.extension() {
            // A module's tests may reach further than the module.
            _ if path.file_stem().is_some_and(|stem| stem == "tests") => {}
            Some(extension) if extension == "rs" => files.push(path),
            None => collect(&path, files),
            Some(_) => {}
        }
    }
}

fn read(path: PathBuf, place: &str, module: Option<&str>) -> Source {
    let inside = path.strip_prefix(place).expect("below its place");
    let first = inside.components().next().expect("a name").as_os_str().to_string_lossy();
    let module = match module {
        Some(module) => module.to_owned(),
        None if inside == Path::new("api/client.rs") => "api::client".into(),
        None => first.trim_end_matches(".rs").to_owned(),
    };
    let text = std::fs::read_to_string(&path).expect("a source file");
    // Not where tests in a file of their own are only named.
    let tests = text.match_indices("#[cfg(test)]\nmod ").find(|(at, _)| {
        let line = text[at + "#[cfg(test)]\n".len()..].lines().next();
        line.is_some_and(|line| line.ends_with('{'))
    });
    let code = &text[..tests.map_or(text.len(), |(at, _)| at)];
    let code = code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    Source { path, module, code }
}

/// The crate's modules that some code names.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let list = list.split('}').next().unwrap_or_default();
            found.extend(list.split(',').map(|name| first_name(name.trim())));
        } else if rest.starts_with("api::client") {
            found.insert("api::client".into());
        } else {
            found.insert(first_name(rest));
        }
    }
    found.remove("");
    found
}

fn first_name(path: &str) -> String {
    path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[test]
fn imports_point_down() {
    for source in sources() {
        let module = source.module.as_str();
        // What the members of the workspace may depend on, their manifests say.
        if ["main", "lib", "app", "kernels", "proto"].contains(&module) {
            continue;
        }
        let allowed: Vec<&str> = match MAY_IMPORT.iter().find(|(name, _)| *name == module) {
            Some((_, list)) => list.iter().chain(LEAVES).copied().collect(),
            None => {
                assert!(
                    LEAVES.contains(&module),
                    "{}: say in this test what {module} may import",
                    source.path.display()
                );
                LEAVES.to_vec()
            }
        };
        for import in imports(&source.code) {
            let own = import == module || module.starts_with(&format!("{import}::"));
            assert!(own || allowed.contains(&import.as_str()), "{} must not import {import}", source.path.display());
        }
    }
}

#[test]
fn the_command_line_takes_only_the_wire_from_the_api() {
    for source in sources().into_iter().filter(|s| s.module == "cli" || s.module == "api::client") {
        for (at, _) in source.code.match_indices("crate::api::") {
            let name = first_name(&source.code[at + "crate::api::".len()..]);
            assert!(["client", "proto"].contains(&name.as_str()), "{} uses api::{name}", source.path.display());
        }
    }
}

/// Asserts that `needle` appears only in the modules that are named.
fn only_in(needle: &str, allowed: &[&str]) {
    for source in sources() {
        let path = source.path.to_string_lossy().replace('\\', "/");
        let here = allowed.iter().any(|place| source.module == *place || path == format!("src/{place}"));
        assert!(here || !source.code.contains(needle), "{path} holds {needle:?}");
    }
}

#[test]
fn each_thing_has_its_place() {
    only_in("unsafe {", &["kernels", "main"]);
    only_in("unsafe fn", &["kernels"]);
    only_in("unsafe impl", &["kernels"]);
    only_in("sqlx", &["store"]);
    only_in("tonic", &["api", "api::client", "proto"]);
    only_in("prost", &["api", "api::client"]);
    only_in("object_store", &["store"]);
    only_in("Tenant::proven", &["api/auth.rs", "store"]);
}

#[test]
fn the_model_knows_no_runtime() {
    for source in sources().into_iter().filter(|s| NO_TOKIO.contains(&s.module.as_str())) {
        assert!(!source.code.contains("tokio"), "{}", source.path.display());
    }
}

/// What makes errors with a reason; the reason is the first text after it.
const MAKERS: [&str; 6] = ["precondition(", "invalid_because(", "refuse(", "info(", "plain(Code::", "about(Code::"];

/// The reasons of errors that some code makes.
fn reasons(code: &str) -> BTreeSet<String> {
    let of = |maker: &str| -> Vec<String> {
        let after = code.match_indices(maker).map(|(at, _)| &code[at + maker.len()..]);
        let text = after.filter_map(|rest| Some(rest.split_once('"')?.1.split_once('"')?.0.to_owned()));
        text.filter(|text| text.len() > 3 && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')).collect()
    };
    MAKERS.iter().flat_map(|maker| of(maker)).collect()
}

/// A program may match on reasons, so each is in `docs/ERRORS.md`, and nothing else is.
#[test]
fn reasons_of_errors_are_documented() {
    let page = std::fs::read_to_string("docs/ERRORS.md").expect("the page");
    let made: BTreeSet<String> = sources().iter().flat_map(|source| reasons(&source.code)).collect();
    assert!(made.len() > 60, "{made:?}");
    let missing: Vec<_> = made.iter().filter(|reason| !page.contains(&format!("`{reason}`"))).collect();
    assert!(missing.is_empty(), "not in docs/ERRORS.md: {missing:?}");
    let words =
        page.split('`').skip(1).step_by(2).filter(|word| word.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'));
    let all: String = sources().iter().map(|source| source.code.as_str()).collect();
    let unknown: Vec<_> = words.filter(|word| !all.contains(&format!("\"{word}\""))).collect();
    assert!(unknown.is_empty(), "in docs/ERRORS.md and nowhere else: {unknown:?}");
}

/// What `/metrics` shows is described, and nothing else is.
#[test]
fn metrics_are_described() {
    let described: BTreeSet<&str> = tenora::telemetry::described::METRICS.iter().map(|(name, _)| *name).collect();
    let sources = sources();
    let others = sources.iter().filter(|source| !source.path.ends_with("described.rs"));
    let made: BTreeSet<&str> = others
        .flat_map(|source| ["counter!(", "histogram!(", "gauge!("].map(|maker| source.code.split(maker).skip(1)))
        .flatten()
        .map(|rest| rest.strip_prefix('"').and_then(|rest| rest.split('"').next()).expect("a name that is written out"))
        .collect();
    assert_eq!(made, described);
}

/// README's table of bases has a row for each architecture and names each block format, and no other.
#[test]
fn the_readme_lists_what_is_served() {
    let readme = std::fs::read_to_string("README.md").expect("the page");
    let (_, section) = readme.split_once("\n## Bases\n").expect("the section");
    let section = section.split("\n## ").next().expect("its text");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let known: Vec<&str> = tenora::arch::ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
    assert_eq!(rows.collect::<Vec<_>>(), known);
    let (_, formats) = section.split_once("mixed in one file as they come: ").expect("the formats");
    let formats: BTreeSet<&str> = formats.split('.').next().expect("a list").split(", ").collect();
    assert_eq!(formats, tenora::kernels::format::QType::ALL.iter().map(|qtype| qtype.name()).collect());
}

#[test]
fn the_checks_can_fail() {
    assert_eq!(imports("use crate::{api, store::Store};"), BTreeSet::from(["api".into(), "store".into()]));
    assert_eq!(imports("crate::api::client::X; crate::hub::Hub"), BTreeSet::from(["api::client".into(), "hub".into()]));
}
