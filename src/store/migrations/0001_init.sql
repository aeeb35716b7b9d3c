-- Everything belongs to a tenant and goes with it. Times are unix milliseconds. A `blob` is the key of the folder (or file) that the
-- row owns in the blob store; a blob that no row owns is collected.

CREATE TABLE tenants (
    tenant            TEXT PRIMARY KEY,
    display_name      TEXT NOT NULL,
    requests          INTEGER NOT NULL DEFAULT 0,
    prompt_tokens     INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    training_tokens   INTEGER NOT NULL DEFAULT 0,
    policy_phrases    TEXT NOT NULL DEFAULT '[]', -- JSON array of strings
    policy_etag       TEXT NOT NULL,
    create_time       INTEGER NOT NULL
) STRICT;

-- The first result of every call that carried a request id.
CREATE TABLE requests (
    tenant     TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    method     TEXT NOT NULL,
    request_id TEXT NOT NULL,
    result     TEXT NOT NULL, -- the name of the resource it made
    create_time INTEGER NOT NULL,
    PRIMARY KEY (tenant, method, request_id)
) STRICT;

CREATE TABLE api_keys (
    key          TEXT PRIMARY KEY,
    tenant       TEXT REFERENCES tenants ON DELETE CASCADE, -- NULL: an operator's
    hash         BLOB NOT NULL,                             -- SHA-256 of the secret
    display_name TEXT NOT NULL,
    create_time  INTEGER NOT NULL,
    revoke_time  INTEGER
) STRICT;
CREATE INDEX api_keys_by_tenant ON api_keys (tenant, key);

CREATE TABLE adapters (
    tenant       TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    adapter      TEXT NOT NULL,
    live_version INTEGER,
    etag         TEXT NOT NULL,
    create_time  INTEGER NOT NULL,
    update_time  INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter)
) STRICT;

-- The last version number given under a name. Outlives the adapter, so that a version's name never means two contents.
CREATE TABLE version_numbers (
    tenant  TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    adapter TEXT NOT NULL,
    last    INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter)
) STRICT;

CREATE TABLE versions (
    uid             TEXT PRIMARY KEY, -- random, never given twice; caches are keyed by it
    tenant          TEXT NOT NULL,
    adapter         TEXT NOT NULL,
    version         INTEGER NOT NULL,
    digest          TEXT NOT NULL,
    base_digest     TEXT NOT NULL,
    template_digest TEXT NOT NULL,
    size_bytes      INTEGER NOT NULL,
    memory_bytes    INTEGER NOT NULL,
    rank            INTEGER NOT NULL,
    targets         TEXT NOT NULL, -- JSON array of strings
    parity          TEXT NOT NULL, -- JSON of ParityReport
    job             TEXT,
    metrics         TEXT NOT NULL, -- JSON object of numbers
    blob            TEXT NOT NULL,
    create_time     INTEGER NOT NULL,
    UNIQUE (tenant, adapter, version),
    FOREIGN KEY (tenant, adapter) REFERENCES adapters ON DELETE CASCADE
) STRICT;
CREATE INDEX versions_by_blob ON versions (blob);

CREATE TABLE datasets (
    tenant      TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    dataset     TEXT NOT NULL,
    kind        TEXT NOT NULL,
    records     INTEGER NOT NULL,
    size_bytes  INTEGER NOT NULL,
    digest      TEXT NOT NULL,
    blob        TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (tenant, dataset)
) STRICT;
CREATE INDEX datasets_by_blob ON datasets (blob);

CREATE TABLE jobs (
    tenant          TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    job             TEXT NOT NULL,
    adapter         TEXT NOT NULL, -- gets the new version
    from_adapter    TEXT,          -- with from_version: where a continued job starts
    from_version    INTEGER,
    dataset         TEXT NOT NULL,
    state           TEXT NOT NULL, -- QUEUED, RUNNING, ...
    spec            TEXT NOT NULL, -- JSON of JobSpec
    step            INTEGER NOT NULL DEFAULT 0,
    total_steps     INTEGER NOT NULL DEFAULT 0,
    version_adapter TEXT,          -- with version: what the job made
    version         INTEGER,
    error           TEXT,
    worker          TEXT,
    lease_until     INTEGER,
    create_time     INTEGER NOT NULL,
    start_time      INTEGER,
    end_time        INTEGER,
    PRIMARY KEY (tenant, job)
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, create_time);

CREATE TABLE job_events (
    tenant   TEXT NOT NULL,
    job      TEXT NOT NULL,
    sequence INTEGER NOT NULL, -- counts from 1 within a job
    time     INTEGER NOT NULL,
    event    TEXT NOT NULL,    -- JSON of JobEvent
    PRIMARY KEY (tenant, job, sequence),
    FOREIGN KEY (tenant, job) REFERENCES jobs ON DELETE CASCADE
) STRICT;
