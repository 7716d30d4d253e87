package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// layer is a part of the image's file system.
type layer struct {
	what  string // in a few words
	files tree
}

// spec says what an image is to be.
type spec struct {
	arch    arch
	names   []string // repository:tag
	created time.Time
	layers  []layer
	config  v1.Config
}

// write makes the archive of an image.
func (s spec) write(file string) (result, error) {
	img, layers, err := s.image()
	if err != nil {
		return result{}, err
	}
	digest, err := img.Digest()
	if err != nil {
		return result{}, err
	}
	raw, err := archive(img, s.names)
	if err != nil {
		return result{}, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return result{}, err
	}
	r := result{archive: file, size: int64(len(raw)), digest: digest.String(), layers: layers}
	return r, os.WriteFile(file, raw, 0o644)
}

func (s spec) image() (v1.Image, []layerSize, error) {
	config := &v1.ConfigFile{
		Architecture: string(s.arch), OS: "linux", Created: v1.Time{Time: s.created},
		RootFS: v1.RootFS{Type: "layers"}, Config: s.config,
	}
	if s.arch == arm64 {
		config.Variant = "v8"
	}
	img, err := mutate.ConfigFile(empty.Image, config)
	if err != nil {
		return nil, nil, err
	}
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
	var sizes []layerSize
	for _, l := range s.layers {
		plain, err := pack(l.files)
		if err != nil {
			return nil, nil, err
		}
		packed, err := tarball.LayerFromOpener(
			func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(plain)), nil },
			tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestCompression),
			tarball.WithCompressedCaching)
		if err != nil {
			return nil, nil, err
		}
		size, err := packed.Size()
		if err != nil {
			return nil, nil, err
		}
		sizes = append(sizes, layerSize{l.what, int64(len(plain)), size})
		history := v1.History{Created: config.Created, CreatedBy: l.what}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: packed, History: history}); err != nil {
			return nil, nil, err
		}
	}
	return mutate.Annotations(img, s.config.Labels).(v1.Image), sizes, nil
}

// archive is an OCI layout, which `ctr images import` reads, and beside it the manifest.json that `docker load` reads,
// for the same blobs.
func archive(img v1.Image, names []string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "overlay-image-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	oci, err := layout.Write(dir, empty.Index)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		err := oci.AppendImage(img, layout.WithPlatform(*config.Platform()), layout.WithAnnotations(map[string]string{
			"io.containerd.image.name":          name,
			"org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:],
		}))
		if err != nil {
			return nil, err
		}
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	docker := tarball.Descriptor{Config: blobPath(m.Config.Digest), RepoTags: names}
	for _, l := range m.Layers {
		docker.Layers = append(docker.Layers, blobPath(l.Digest))
	}
	raw, err := json.Marshal(tarball.Manifest{docker})
	if err != nil {
		return nil, err
	}
	t := tree{}
	put(t, "manifest.json", 0o644, raw)
	files := os.DirFS(dir)
	err = fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := fs.ReadFile(files, name)
		put(t, name, 0o644, raw)
		return err
	})
	if err != nil {
		return nil, err
	}
	return pack(t)
}

func blobPath(digest v1.Hash) string { return "blobs/" + digest.Algorithm + "/" + digest.Hex }
