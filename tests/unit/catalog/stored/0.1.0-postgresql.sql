CREATE TABLE public.adapters (
    id bigint NOT NULL,
    name character varying(128) NOT NULL,
    rank integer NOT NULL,
    bytes bigint NOT NULL,
    info json NOT NULL,
    created_at double precision NOT NULL,
    last_used_at double precision,
    composed boolean DEFAULT false NOT NULL
);
CREATE SEQUENCE public.adapters_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.adapters_id_seq OWNED BY public.adapters.id;
CREATE TABLE public.duties (
    name character varying(64) NOT NULL,
    taken_at double precision NOT NULL
);
CREATE TABLE public.files (
    number bigint NOT NULL,
    id character varying(64) NOT NULL,
    tenant character varying(128) NOT NULL,
    filename character varying(1024) NOT NULL,
    purpose character varying(32) NOT NULL,
    bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL,
    adapter_name character varying(128) NOT NULL,
    previous_adapter character varying(128),
    state character varying(16) NOT NULL,
    progress double precision NOT NULL,
    error_code character varying(64),
    error_message character varying(2048),
    created_at double precision NOT NULL,
    last_used_at double precision,
    expires_at double precision,
    idle_seconds double precision,
    pinned boolean DEFAULT false NOT NULL,
    ended_at double precision,
    generation character varying(32) DEFAULT ''::character varying NOT NULL
);
CREATE SEQUENCE public.files_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.files_number_seq OWNED BY public.files.number;
CREATE TABLE public.jobs (
    id bigint NOT NULL,
    adapter_name character varying(128) NOT NULL,
    sha256 character varying(64) NOT NULL,
    running integer NOT NULL,
    attempts integer NOT NULL,
    background boolean DEFAULT false NOT NULL,
    pool character varying(64),
    created_at double precision NOT NULL
);
CREATE SEQUENCE public.jobs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.jobs_id_seq OWNED BY public.jobs.id;
CREATE TABLE public.parts (
    composed character varying(128) NOT NULL,
    part character varying(128) NOT NULL
);
CREATE TABLE public.pools (
    id character varying(64) NOT NULL,
    seen_at double precision NOT NULL
);
CREATE TABLE public.tombstones (
    seq bigint NOT NULL,
    kind character varying(8) NOT NULL,
    name character varying(128) NOT NULL,
    generation character varying(32) DEFAULT ''::character varying NOT NULL,
    doomed_at double precision NOT NULL,
    reserved boolean DEFAULT false NOT NULL,
    done_at double precision
);
CREATE SEQUENCE public.tombstones_seq_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.tombstones_seq_seq OWNED BY public.tombstones.seq;
CREATE TABLE public.usage (
    tenant character varying(128) NOT NULL,
    bytes bigint NOT NULL
);
ALTER TABLE ONLY public.adapters ALTER COLUMN id SET DEFAULT nextval('public.adapters_id_seq'::regclass);
ALTER TABLE ONLY public.files ALTER COLUMN number SET DEFAULT nextval('public.files_number_seq'::regclass);
ALTER TABLE ONLY public.jobs ALTER COLUMN id SET DEFAULT nextval('public.jobs_id_seq'::regclass);
ALTER TABLE ONLY public.tombstones ALTER COLUMN seq SET DEFAULT nextval('public.tombstones_seq_seq'::regclass);
INSERT INTO public.adapters VALUES (1, 'f2l-a', 16, 100, '{"frames": 8}', 1795352408.0690658, NULL, false);
INSERT INTO public.adapters VALUES (2, 'f2l-b', 16, 100, '{"frames": 8}', 1795352408.563102, NULL, false);
INSERT INTO public.adapters VALUES (3, 'f2l-ab', 32, 200, '{"frames": 8}', 1795352408.6534855, NULL, true);
INSERT INTO public.duties VALUES ('sweep', 1795352409.457937);
INSERT INTO public.files VALUES (1, 'file-6b13638dd72e0d111a1a4a3a', 't', 'first.mp4', 'vision', 3, 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'f2l-a', NULL, 'processed', 1, NULL, NULL, 1795352407.5483487, NULL, NULL, NULL, true, NULL, '');
INSERT INTO public.files VALUES (2, 'file-8d3f14cc6a241bd4c214e318', 't', 'second.mp4', 'vision', 3, 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'f2l-b', NULL, 'processed', 1, NULL, NULL, 1795352408.292783, NULL, NULL, NULL, false, NULL, '2920716c25cce682');
INSERT INTO public.files VALUES (3, 'file-123f99fbfc5e8e6046293f5f', 'u', 'working.mp4', 'vision', 3, 'cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc', 'f2l-c', NULL, 'decoding', 0.5, NULL, NULL, 1795352408.956113, NULL, NULL, NULL, false, NULL, 'c9f6d2619977648b');
INSERT INTO public.files VALUES (4, 'file-d7dac06ad0ceece57b9730ea', 't', 'waiting.mp4', 'vision', 3, 'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd', 'f2l-d', NULL, 'uploaded', 0, NULL, NULL, 1795352409.3154066, NULL, NULL, NULL, false, NULL, 'd7ce3eee73b78000');
INSERT INTO public.files VALUES (5, 'file-8ed0b3715fb4218628ba0e09', 't', 'deleted.mp4', 'vision', 3, 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', 'f2l-e', NULL, 'deleted', 0, NULL, NULL, 1795352409.371126, NULL, NULL, NULL, false, 1795352409.3885117, 'e9c5be5e0d77e768');
INSERT INTO public.jobs VALUES (3, 'f2l-c', 'cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc', 1, 1, false, 'pool-1', 1795352408.9449756);
INSERT INTO public.jobs VALUES (4, 'f2l-d', 'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd', 0, 0, false, NULL, 1795352409.3136852);
INSERT INTO public.parts VALUES ('f2l-ab', 'f2l-a');
INSERT INTO public.parts VALUES ('f2l-ab', 'f2l-b');
INSERT INTO public.tombstones VALUES (5, 'video', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', 'e9c5be5e0d77e768', 1795352409.405735, false, NULL);
INSERT INTO public.usage VALUES ('u', 3);
INSERT INTO public.usage VALUES ('t', 9);
SELECT pg_catalog.setval('public.adapters_id_seq', 3, true);
SELECT pg_catalog.setval('public.files_number_seq', 5, true);
SELECT pg_catalog.setval('public.jobs_id_seq', 5, true);
SELECT pg_catalog.setval('public.tombstones_seq_seq', 5, true);
ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_name_key UNIQUE (name);
ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.duties
    ADD CONSTRAINT duties_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_id_key UNIQUE (id);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_pkey PRIMARY KEY (number);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_adapter_name_key UNIQUE (adapter_name);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.parts
    ADD CONSTRAINT parts_pkey PRIMARY KEY (composed, part);
ALTER TABLE ONLY public.pools
    ADD CONSTRAINT pools_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.tombstones
    ADD CONSTRAINT tombstones_pkey PRIMARY KEY (seq);
ALTER TABLE ONLY public.usage
    ADD CONSTRAINT usage_pkey PRIMARY KEY (tenant);
CREATE INDEX adapters_composed ON public.adapters USING btree (id) WHERE (composed IS TRUE);
CREATE INDEX files_by_state ON public.files USING btree (state, tenant, number);
CREATE INDEX files_by_tenant ON public.files USING btree (tenant, number);
CREATE INDEX ix_files_adapter_name ON public.files USING btree (adapter_name);
CREATE INDEX ix_files_ended_at ON public.files USING btree (ended_at);
CREATE INDEX ix_files_expires_at ON public.files USING btree (expires_at);
CREATE INDEX ix_files_previous_adapter ON public.files USING btree (previous_adapter);
CREATE INDEX ix_files_sha256 ON public.files USING btree (sha256);
CREATE INDEX ix_parts_part ON public.parts USING btree (part);
CREATE INDEX ix_tombstones_done_at ON public.tombstones USING btree (done_at);
CREATE INDEX jobs_in_line ON public.jobs USING btree (running, background, id);
CREATE INDEX tombstones_by_name ON public.tombstones USING btree (name);
