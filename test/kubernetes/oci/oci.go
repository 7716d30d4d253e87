// Package oci writes small container images: one layer of static programs, as an archive that `ctr images import` takes.
package oci

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"runtime"
	"strings"
)

// Image is what to write.
type Image struct {
	Names      []string          // repository:tag
	Files      map[string]string // path in the image, without the first slash: file on this machine
	Entrypoint []string
}

type object = map[string]any

// Write writes the archive to a file.
func (i Image) Write(path string) error {
	layer, err := i.layer()
	if err != nil {
		return err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	blob := func(mediaType string, data []byte) (object, error) {
		sum := sha256.Sum256(data)
		digest := hex.EncodeToString(sum[:])
		err := file(w, "blobs/sha256/"+digest, 0o644, data)
		return object{"mediaType": mediaType, "digest": "sha256:" + digest, "size": len(data)}, err
	}
	document := func(mediaType string, value object) (object, error) {
		raw, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		return blob(mediaType, raw)
	}
	content, err := blob("application/vnd.oci.image.layer.v1.tar", layer)
	if err != nil {
		return err
	}
	config, err := document("application/vnd.oci.image.config.v1+json", object{
		"architecture": runtime.GOARCH, "os": "linux", "config": object{"Entrypoint": i.Entrypoint, "WorkingDir": "/"},
		"rootfs": object{"type": "layers", "diff_ids": []any{content["digest"]}},
	})
	if err != nil {
		return err
	}
	manifest, err := document("application/vnd.oci.image.manifest.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []any{content},
	})
	if err != nil {
		return err
	}
	var named []object
	for _, name := range i.Names {
		m := object{"annotations": object{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:]}}
		for k, v := range manifest {
			m[k] = v
		}
		named = append(named, m)
	}
	index, err := json.Marshal(object{"schemaVersion": 2, "manifests": named})
	if err != nil {
		return err
	}
	if err := file(w, "index.json", 0o644, index); err != nil {
		return err
	}
	if err := file(w, "oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

func (i Image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, source := range i.Files {
		data, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		if err := file(w, name, 0o755, data); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

func file(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
