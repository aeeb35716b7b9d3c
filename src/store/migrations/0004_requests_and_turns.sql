-- What a call with a request id asked for, so that another one under the same id is found out: the name of its target and its content, as
-- the method compares it. Earlier rows get the name where it can be told.

ALTER TABLE requests ADD COLUMN target TEXT;
ALTER TABLE requests ADD COLUMN content TEXT;
UPDATE requests SET target = result WHERE method = 'CreateTenant';
UPDATE requests SET target = 'tenants/' || tenant WHERE method = 'CreateApiKey';
UPDATE requests SET target = substr(result, 1, instr(result, '/versions/') - 1) WHERE method IN ('ImportAdapter', 'PublishTrained');
UPDATE requests SET target = (
    SELECT 'tenants/' || d.tenant || '/datasets/' || d.dataset FROM datasets d WHERE d.tenant = requests.tenant AND d.blob = requests.result
) WHERE method IN ('UploadDataset', 'UploadPreferences');
UPDATE requests SET target = (
    SELECT 'tenants/' || j.tenant || '/adapters/' || j.adapter FROM jobs j
    WHERE j.tenant = requests.tenant AND requests.result = 'tenants/' || j.tenant || '/trainingJobs/' || j.job
) WHERE method = 'Train';
CREATE INDEX requests_by_id ON requests (method, request_id);

-- When a tenant's last job started: whose turn it is, without a look at all its jobs. 0: never.

ALTER TABLE tenants ADD COLUMN last_start INTEGER NOT NULL DEFAULT 0;
UPDATE tenants SET last_start = COALESCE((SELECT MAX(start_time) FROM jobs WHERE jobs.tenant = tenants.tenant), 0);
