//! The composition root: puts a server together and runs it until told to stop.
