package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
)

// The media types of the OCI image format.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []descriptor `json:"manifests"`
}

type imageConfig struct {
	platform
	Created time.Time       `json:"created"`
	Config  containerConfig `json:"config"`
	RootFS  rootFS          `json:"rootfs"`
	History []history       `json:"history"`
}

type containerConfig struct {
	User       string            `json:",omitempty"`
	Env        []string          `json:",omitempty"`
	Entrypoint []string          `json:",omitempty"`
	WorkingDir string            `json:",omitempty"`
	Labels     map[string]string `json:",omitempty"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type history struct {
	Created   time.Time `json:"created"`
	CreatedBy string    `json:"created_by"`
}

// dockerManifest is an entry of manifest.json, which `docker load` reads.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// layer is a part of the image's file system.
type layer struct {
	what  string // in a few words
	files tree
}

// archive is an image in one file: an OCI layout, with Docker's manifest.json beside it.
type archive struct {
	names []string // entries in their order
	data  map[string][]byte
}

func (a *archive) add(name string, data []byte) {
	if _, ok := a.data[name]; !ok {
		a.names = append(a.names, name)
	}
	a.data[name] = data
}

// blob adds content under the name of its hash.
func (a *archive) blob(mediaType string, data []byte) descriptor {
	sum := hash(data)
	a.add(blobPath("sha256:"+sum), data)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: int64(len(data))}
}

func (a *archive) json(mediaType string, value any) (descriptor, error) {
	raw, err := json.Marshal(value)
	return a.blob(mediaType, raw), err
}

func blobPath(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// spec says what an image is to be.
type spec struct {
	arch       Arch
	names      []string // repository:tag
	version    string
	created    time.Time
	layers     []layer
	entrypoint []string
	env        []string
	labels     map[string]string
}

// pack makes the archive. It also returns the digest of the manifest, and the sizes.
func (s spec) pack() (*archive, Sizes, error) {
	a := &archive{data: map[string][]byte{}}
	var sizes Sizes
	c := imageConfig{
		platform: s.platform(), Created: s.created, RootFS: rootFS{Type: "layers"},
		Config: containerConfig{User: "0:0", Entrypoint: s.entrypoint, WorkingDir: "/", Labels: s.labels, Env: s.env},
	}
	m := manifest{SchemaVersion: 2, MediaType: typeManifest, Annotations: s.labels}
	docker := dockerManifest{RepoTags: s.names}
	for _, l := range s.layers {
		plain, err := l.files.tar()
		if err != nil {
			return nil, sizes, err
		}
		packed, err := compress(plain)
		if err != nil {
			return nil, sizes, err
		}
		d := a.blob(typeLayer, packed)
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, "sha256:"+hash(plain))
		c.History = append(c.History, history{s.created, l.what})
		m.Layers = append(m.Layers, d)
		docker.Layers = append(docker.Layers, blobPath(d.Digest))
		sizes.Layers = append(sizes.Layers, LayerSize{l.what, len(plain), len(packed)})
	}
	var err error
	if m.Config, err = a.json(typeConfig, c); err != nil {
		return nil, sizes, err
	}
	docker.Config = blobPath(m.Config.Digest)
	d, err := a.json(typeManifest, m)
	if err != nil {
		return nil, sizes, err
	}
	sizes.Digest = d.Digest
	p := s.platform()
	d.Platform = &p
	i := index{SchemaVersion: 2, MediaType: typeIndex}
	for _, name := range s.names {
		named := d
		named.Annotations = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:]}
		i.Manifests = append(i.Manifests, named)
	}
	for name, value := range map[string]any{"index.json": i, "manifest.json": []dockerManifest{docker}} {
		raw, err := json.Marshal(value)
		if err != nil {
			return nil, sizes, err
		}
		a.data[name] = raw
	}
	a.data["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	a.names = append([]string{"oci-layout", "index.json", "manifest.json"}, a.names...)
	return a, sizes, nil
}

func (s spec) platform() platform {
	p := platform{Architecture: string(s.arch), OS: "linux"}
	if s.arch == ARM64 {
		p.Variant = "v8"
	}
	return p
}

func (a *archive) write(out io.Writer) error {
	w := tar.NewWriter(out)
	for _, name := range a.names {
		data := a.data[name]
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR, Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
	}
	return w.Close()
}

func compress(data []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	err = w.Close()
	return out.Bytes(), err
}
