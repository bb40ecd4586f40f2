BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	name VARCHAR(128) NOT NULL, 
	rank INTEGER NOT NULL, 
	bytes BIGINT NOT NULL, 
	info JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	last_used_at FLOAT, 
	composed BOOLEAN DEFAULT 0 NOT NULL, 
	UNIQUE (name)
);
INSERT INTO "adapters" VALUES(1,'f2l-a',16,100,'{"frames": 8}',1.79535239127806568138e+09,NULL,0);
INSERT INTO "adapters" VALUES(2,'f2l-b',16,100,'{"frames": 8}',1.79535239189560604095e+09,NULL,0);
INSERT INTO "adapters" VALUES(3,'f2l-ab',32,200,'{"frames": 8}',1.79535239193139386183e+09,NULL,1);
CREATE TABLE duties (
	name VARCHAR(64) NOT NULL, 
	taken_at FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "duties" VALUES('sweep',1.7953523922455463409e+09);
CREATE TABLE files (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant VARCHAR(128) NOT NULL, 
	filename VARCHAR(1024) NOT NULL, 
	purpose VARCHAR(32) NOT NULL, 
	bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	adapter_name VARCHAR(128) NOT NULL, 
	previous_adapter VARCHAR(128), 
	state VARCHAR(16) NOT NULL, 
	progress FLOAT NOT NULL, 
	error_code VARCHAR(64), 
	error_message VARCHAR(2048), 
	created_at FLOAT NOT NULL, 
	last_used_at FLOAT, 
	expires_at FLOAT, 
	idle_seconds FLOAT, 
	pinned BOOLEAN DEFAULT 0 NOT NULL, 
	ended_at FLOAT, 
	generation VARCHAR(32) DEFAULT '' NOT NULL, 
	UNIQUE (id)
);
INSERT INTO "files" VALUES(1,'file-146db9b90e4fa22363aa78b1','t','first.mp4','vision',3,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','f2l-a',NULL,'processed',1.0,NULL,NULL,1.79535239104344391822e+09,NULL,NULL,NULL,1,NULL,'');
INSERT INTO "files" VALUES(2,'file-8d7666dd4abc497ba9ecc1d7','t','second.mp4','vision',3,'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','f2l-b',NULL,'processed',1.0,NULL,NULL,1.79535239162125945092e+09,NULL,NULL,NULL,0,NULL,'3452dbe8262f4595');
INSERT INTO "files" VALUES(3,'file-034c52de6b663b8897b9cd59','u','working.mp4','vision',3,'cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','f2l-c',NULL,'decoding',0.5,NULL,NULL,1.7953523920025751591e+09,NULL,NULL,NULL,0,NULL,'8547feb6367450f9');
INSERT INTO "files" VALUES(4,'file-ce99ccbc9bba6817816f7f12','t','waiting.mp4','vision',3,'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','f2l-d',NULL,'uploaded',0.0,NULL,NULL,1.79535239209362030027e+09,NULL,NULL,NULL,0,NULL,'541c6b387e14f263');
INSERT INTO "files" VALUES(5,'file-a86b5263f50756db0aa078f6','t','deleted.mp4','vision',3,'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee','f2l-e',NULL,'deleted',0.0,NULL,NULL,1.79535239212926793096e+09,NULL,NULL,NULL,0,1.79535239214883041384e+09,'48ec28b615f3991e');
CREATE TABLE jobs (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	adapter_name VARCHAR(128) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	running INTEGER NOT NULL, 
	attempts INTEGER NOT NULL, 
	background BOOLEAN DEFAULT 0 NOT NULL, 
	pool VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	UNIQUE (adapter_name)
);
INSERT INTO "jobs" VALUES(3,'f2l-c','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc',1,1,0,'pool-1',1.79535239198858451842e+09);
INSERT INTO "jobs" VALUES(4,'f2l-d','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',0,0,0,NULL,1.7953523920933833122e+09);
CREATE TABLE parts (
	composed VARCHAR(128) NOT NULL, 
	part VARCHAR(128) NOT NULL, 
	PRIMARY KEY (composed, part)
);
INSERT INTO "parts" VALUES('f2l-ab','f2l-a');
INSERT INTO "parts" VALUES('f2l-ab','f2l-b');
CREATE TABLE pools (
	id VARCHAR(64) NOT NULL, 
	seen_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE tombstones (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	kind VARCHAR(8) NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	generation VARCHAR(32) DEFAULT '' NOT NULL, 
	doomed_at FLOAT NOT NULL, 
	reserved BOOLEAN DEFAULT 0 NOT NULL, 
	done_at FLOAT
);
INSERT INTO "tombstones" VALUES(5,'video','eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee','48ec28b615f3991e',1795352392.17015,0,NULL);
CREATE TABLE usage (
	tenant VARCHAR(128) NOT NULL, 
	bytes BIGINT NOT NULL, 
	PRIMARY KEY (tenant)
);
INSERT INTO "usage" VALUES('t',9);
INSERT INTO "usage" VALUES('u',3);
CREATE INDEX ix_files_ended_at ON files (ended_at);
CREATE INDEX files_by_tenant ON files (tenant, number);
CREATE INDEX ix_files_adapter_name ON files (adapter_name);
CREATE INDEX ix_files_sha256 ON files (sha256);
CREATE INDEX ix_files_expires_at ON files (expires_at);
CREATE INDEX ix_files_previous_adapter ON files (previous_adapter);
CREATE INDEX files_by_state ON files (state, tenant, number);
CREATE INDEX adapters_composed ON adapters (id) WHERE composed IS 1;
CREATE INDEX ix_parts_part ON parts (part);
CREATE INDEX jobs_in_line ON jobs (running, background, id);
CREATE INDEX tombstones_by_name ON tombstones (name);
CREATE INDEX ix_tombstones_done_at ON tombstones (done_at);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',5);
INSERT INTO "sqlite_sequence" VALUES('files',5);
INSERT INTO "sqlite_sequence" VALUES('adapters',3);
INSERT INTO "sqlite_sequence" VALUES('tombstones',5);
COMMIT;
