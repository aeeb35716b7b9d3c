-- What a job leaves before it is published, and what it trained on; and why a version is kept from going live.

ALTER TABLE jobs ADD COLUMN result TEXT; -- the blob of its trained adapter, owned from before it is written until the job has ended
ALTER TABLE jobs ADD COLUMN data TEXT;   -- JSON of TrainingData
ALTER TABLE versions ADD COLUMN held_reason TEXT;
