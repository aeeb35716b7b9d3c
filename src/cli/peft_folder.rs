//! A folder as a trainer leaves it: the two files of an adapter are found in it, the rest is named and never read.

use std::path::{Path, PathBuf};

use super::{Failure, Result};

/// The two files of an adapter, as PEFT and an import call them.
const CONFIG_FILE: &str = "adapter_config.json";
const TENSORS_FILE: &str = "adapter_model.safetensors";

/// What a file begins with that only says where Git LFS keeps the real one.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// PEFT's older file of tensors, which can run code when it is read.
const PICKLE_FILE: &str = "adapter_model.bin";

/// Folders of trainers hold states of training; most file names that are listed.
const LISTED: usize = 12;

/// What is sent of a folder, and what is not.
#[derive(Debug, PartialEq)]
pub(super) struct PeftFolder {
    /// The two files, by their names.
    pub(super) files: Vec<(String, Vec<u8>)>,
    /// Where they were found.
    pub(super) folder: PathBuf,
    /// Names of what lies beside them.
    pub(super) unused: Vec<String>,
}

impl PeftFolder {
    /// Reads the adapter of a folder: in it, or in the one folder in it that PEFT has named after the adapter.
    ///
    /// # Errors
    /// A sentence that says what the folder holds in place of an adapter, and what to do.
    pub(super) fn read(given: &Path) -> Result<Self> {
        let folder = find(given)?;
        let names = names(&folder)?;
        if !names.iter().any(|name| name == TENSORS_FILE) {
            return Err(Failure::other(format!("{}: {}", folder.display(), instead_of_tensors(&names))));
        }
        let read = |name: &str| {
            let path = folder.join(name);
            let content = std::fs::read(&path).map_err(Failure::at(&path))?;
            match content.starts_with(LFS_POINTER) {
                true => Err(Failure::other(format!(
                    "{} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder and import it again",
                    path.display()
                ))),
                false => Ok((name.to_owned(), content)),
            }
        };
        let files = vec![read(CONFIG_FILE)?, read(TENSORS_FILE)?];
        let unused = names.into_iter().filter(|name| name != CONFIG_FILE && name != TENSORS_FILE).collect();
        Ok(Self { files, folder, unused })
    }

    /// Says what of the folder is used, where that is not all of it.
    pub(super) fn note(&self, given: &Path) -> Option<String> {
        let found = (self.folder != given).then(|| format!("importing {}", self.folder.display()));
        let unused = (!self.unused.is_empty()).then(|| {
            let shown = self.unused.iter().take(LISTED).cloned().collect::<Vec<_>>().join(", ");
            let more = self.unused.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("not used: {shown}{more}")
        });
        let lines: Vec<String> = found.into_iter().chain(unused).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

/// The folder that holds the config: the one that is given, or the only one up to two levels below it; checkpoints beside another do not count.
fn find(given: &Path) -> Result<PathBuf> {
    let other = |what: String| Err(Failure::other(format!("{}: {what}", given.display())));
    if given.is_file() {
        return other(format!("is a file; give the folder that holds {CONFIG_FILE} and {TENSORS_FILE}"));
    }
    if is_adapter(given) {
        return Ok(given.to_owned());
    }
    let (mut found, others): (Vec<PathBuf>, Vec<PathBuf>) =
        folders(given)?.into_iter().partition(|folder| is_adapter(folder));
    // `checkpoint-200/adapter_model`, as older scripts save it; the snapshots of a hub's cache.
    if found.iter().all(|folder| is_checkpoint(folder)) {
        let deeper = others.iter().filter_map(|folder| folders(folder).ok());
        found.extend(deeper.flatten().filter(|folder| is_adapter(folder)));
    }
    let (mut checkpoints, named): (Vec<PathBuf>, Vec<PathBuf>) =
        found.into_iter().partition(|folder| is_checkpoint(folder));
    checkpoints.sort_by_key(|folder| step_of(folder));
    let list =
        |folders: &[PathBuf]| folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ");
    match (&named[..], &checkpoints[..]) {
        ([one], _) => Ok(one.clone()),
        ([], []) => other(instead_of_config(&names(given)?)),
        ([], checkpoints) => other(format!("holds checkpoints of a training; give one of them: {}", list(checkpoints))),
        (several, _) => other(format!("holds more than one adapter; give one of them: {}", list(several))),
    }
}

fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG_FILE).is_file()
}

/// Whether a folder is, or lies in, a `checkpoint-500`, as trainers name them.
fn is_checkpoint(folder: &Path) -> bool {
    step_of(folder).is_some()
}

fn step_of(folder: &Path) -> Option<u64> {
    let mut last_two = folder.components().rev().take(2);
    last_two.find_map(|part| part.as_os_str().to_str()?.strip_prefix("checkpoint-")?.parse().ok())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Failure::at(folder))?;
    let mut paths = entries.map(|entry| Ok(entry.map_err(Failure::at(folder))?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// The folders in a folder, links included.
fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(entries(folder)?.into_iter().filter(|path| path.is_dir()).collect())
}

/// The names in a folder, folders with a slash, without hidden ones.
fn names(folder: &Path) -> Result<Vec<String>> {
    let name = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() { format!("{name}/") } else { name }
    };
    Ok(entries(folder)?.into_iter().map(name).filter(|name| !name.starts_with('.')).collect())
}

/// What a folder with a config has in place of tensors, and what to do.
fn instead_of_tensors(names: &[String]) -> String {
    if names.iter().any(|name| name == PICKLE_FILE) {
        return format!(
            "{PICKLE_FILE} is a pickle, which can run code, and is never read; where you trust it, convert it: python -c \"import torch, \
             safetensors.torch as s; s.save_file(torch.load('{PICKLE_FILE}', weights_only=True), '{TENSORS_FILE}')\""
        );
    }
    if let Some(part) = names.iter().find(|name| name.starts_with("adapter_model") && name.ends_with(".safetensors")) {
        return format!(
            "{part} is a part of the tensors; save the adapter in one file, {TENSORS_FILE}, with PEFT's save_pretrained"
        );
    }
    format!("{TENSORS_FILE} is missing; save the adapter with PEFT's save_pretrained, or copy the file here")
}

/// What a folder without a config is, and what to do.
fn instead_of_config(names: &[String]) -> String {
    if names.is_empty() {
        return format!("is empty; give the folder that holds {CONFIG_FILE} and {TENSORS_FILE}");
    }
    if names.iter().any(|name| name == "config.json") {
        return format!(
            "is a whole model and no adapter: it has config.json and no {CONFIG_FILE}; save the adapter without merging it, with PEFT's save_pretrained"
        );
    }
    let pair = format!("{CONFIG_FILE} and {TENSORS_FILE}");
    format!(
        "holds no {CONFIG_FILE}, neither itself nor in a folder of an adapter's name; give the folder that holds {pair}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of these files, each of its own name.
    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        dir
    }

    #[test]
    fn the_two_files_are_taken_and_the_rest_is_named() {
        let trainer =
            ["optimizer.pt", "trainer_state.json", "README.md", "global_step5/x", ".git/config", "adapter_model.bin"];
        let dir = folder(&[&trainer[..], &[CONFIG_FILE, TENSORS_FILE]].concat());
        // Unreadable as a file: nothing but the two is opened.
        std::fs::remove_file(dir.path().join("optimizer.pt")).unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join("optimizer.pt")).unwrap();
        let read = PeftFolder::read(dir.path()).unwrap();
        let names: Vec<_> = read.files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [CONFIG_FILE, TENSORS_FILE]);
        assert_eq!(
            read.unused,
            ["README.md", "adapter_model.bin", "global_step5/", "optimizer.pt", "trainer_state.json"]
        );
        let note = read.note(dir.path()).unwrap();
        assert_eq!(note, "not used: README.md, adapter_model.bin, global_step5/, optimizer.pt, trainer_state.json");
        let plain = folder(&[CONFIG_FILE, TENSORS_FILE]);
        assert_eq!(PeftFolder::read(plain.path()).unwrap().note(plain.path()), None);
    }

    #[test]
    fn an_adapter_is_found_where_peft_and_the_hub_put_it() {
        let within = |name: &str| [format!("{name}/{CONFIG_FILE}"), format!("{name}/{TENSORS_FILE}")];
        for place in ["my-adapter", "snapshots/0f3a"] {
            let [config, tensors] = within(place);
            let dir = folder(&[&config, &tensors, "README.md"]);
            let read = PeftFolder::read(dir.path()).unwrap();
            assert_eq!(read.folder, dir.path().join(place));
            assert!(read.note(dir.path()).unwrap().contains(place));
        }
        // A snapshot is a folder of links.
        let dir = folder(&["blobs/a", "blobs/b", "snapshots/0f3a/x"]);
        for (blob, name) in [("a", CONFIG_FILE), ("b", TENSORS_FILE)] {
            std::os::unix::fs::symlink(format!("../../blobs/{blob}"), dir.path().join("snapshots/0f3a").join(name))
                .unwrap();
        }
        assert_eq!(PeftFolder::read(dir.path()).unwrap().files[1].1, b"blobs/b");
        // Beside checkpoints, the named one is meant.
        let ([a, b], [c, d]) = (within("tone"), within("checkpoint-10"));
        let dir = folder(&[&a, &b, &c, &d]);
        assert_eq!(PeftFolder::read(dir.path()).unwrap().folder, dir.path().join("tone"));
    }

    #[test]
    fn what_is_no_adapter_is_refused_with_advice() {
        let refused = |files: &[&str]| PeftFolder::read(folder(files).path()).unwrap_err().to_string();
        for (files, says) in [
            (&[][..], "is empty; give the folder"),
            (&["notes.txt"], "holds no adapter_config.json"),
            (&["config.json", "model.safetensors"], "whole model"),
            (&[CONFIG_FILE], "adapter_model.safetensors is missing"),
            (&[CONFIG_FILE, PICKLE_FILE], "weights_only=True"),
            (&[CONFIG_FILE, "adapter_model-00001-of-00002.safetensors"], "in one file"),
            (&["checkpoint-5/adapter_config.json", "checkpoint-10/adapter_config.json"], "checkpoint-5, "),
            (
                &["checkpoint-5/adapter_config.json", "checkpoint-10/adapter_model/adapter_config.json"],
                "checkpoint-5, ",
            ),
            (&["a/adapter_config.json", "b/adapter_config.json"], "more than one adapter"),
        ] {
            let refused = refused(files);
            assert!(refused.contains(says), "{says}: {refused}");
        }
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        for of in [CONFIG_FILE, TENSORS_FILE] {
            let dir = folder(&[CONFIG_FILE, TENSORS_FILE]);
            std::fs::write(dir.path().join(of), pointer).unwrap();
            let refused = PeftFolder::read(dir.path()).unwrap_err().to_string();
            assert!(refused.contains(of) && refused.contains("git lfs pull"), "{refused}");
        }
        let file = folder(&[TENSORS_FILE]);
        let refused = PeftFolder::read(&file.path().join(TENSORS_FILE)).unwrap_err().to_string();
        assert!(refused.contains("is a file; give the folder"), "{refused}");
        assert!(PeftFolder::read(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
    }
}
