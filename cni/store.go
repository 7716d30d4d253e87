package cni

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
)

// store keeps what was generated at ADD: DIR/NETWORK/CONTAINER:INTERFACE. All access goes through os.Root, so that no
// name, and no symbolic link, leads out of the directory.
type store struct {
	dir, network string
}

// attachment is one interface of one container. Its parts were checked: neither can hold a slash or a colon, and a
// container's ID begins with a letter or a digit.
type attachment struct {
	container, ifname string
}

const maxContainerID = 200 // leaves room for the interface in a file name of at most 255 bytes

func newAttachment(container, ifname string) (attachment, error) {
	if err := utils.ValidateContainerID(container); err != nil || len(container) > maxContainerID {
		return attachment{}, types.NewError(types.ErrInvalidEnvironmentVariables,
			fmt.Sprintf("CNI_CONTAINERID: expected at most %d letters, digits, dots, dashes and underscores, found %q", maxContainerID, clip(container)), "")
	}
	if err := utils.ValidateInterfaceName(ifname); err != nil || strings.ContainsRune(ifname, 0) {
		return attachment{}, types.NewError(types.ErrInvalidEnvironmentVariables,
			fmt.Sprintf("CNI_IFNAME: expected the name of a network device, found %q", clip(ifname)), "")
	}
	return attachment{container: container, ifname: ifname}, nil
}

func clip(s string) string { return s[:min(len(s), maxContainerID)] }

func (a attachment) file() string { return a.container + ":" + a.ifname }

func (s store) path(a attachment) string { return filepath.Join(s.dir, s.network, a.file()) }

// save puts a configuration in place in one step. It is not forced to the disk, which would cost more than all the rest
// of ADD: what a power failure breaks is made anew where it is needed.
func (s store) save(a attachment, conf []byte) (err error) {
	if err := os.MkdirAll(filepath.Join(s.dir, s.network), 0o700); err != nil {
		return err
	}
	root, err := s.open()
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	tmp := fmt.Sprintf(".%016x", rand.Uint64()) // no container's ID begins with a dot
	defer func() {
		if err != nil {
			_ = root.Remove(tmp)
		}
	}()
	if err := root.WriteFile(tmp, conf, 0o600); err != nil {
		return err
	}
	return root.Rename(tmp, a.file())
}

func (s store) open() (*os.Root, error) {
	top, err := os.OpenRoot(s.dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = top.Close() }()
	return top.OpenRoot(s.network)
}

// load reads what was kept; fs.ErrNotExist says that nothing was.
func (s store) load(a attachment) ([]byte, error) { return s.read(a.file()) }

func (s store) read(file string) ([]byte, error) {
	root, err := s.open()
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	return root.ReadFile(file)
}

// remove forgets an attachment; one that is not known is forgotten already.
func (s store) remove(a attachment) error {
	root, err := s.open()
	if err == nil {
		err = root.Remove(a.file())
		_ = root.Close()
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// list gives all attachments of the network.
func (s store) list() ([]attachment, error) {
	root, err := s.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var all []attachment
	for _, e := range entries {
		container, ifname, _ := strings.Cut(e.Name(), ":")
		if a, err := newAttachment(container, ifname); err == nil && e.Type().IsRegular() {
			all = append(all, a)
		}
	}
	return all, nil
}

// dirLinks has a link to every dataDir that a list has named, but for the default. No network's name begins with a dot.
const dirLinks = ".dirs"

// noteDir has a directory found by a DEL to which the list names another one.
func (p *Plugin) noteDir(dir string) error {
	if dir = filepath.Clean(dir); dir == p.Home {
		return nil
	}
	links := filepath.Join(p.Home, dirLinks)
	link := filepath.Join(links, fmt.Sprintf("%x", sha256.Sum256([]byte(dir))))
	if to, err := os.Readlink(link); err == nil && to == dir {
		return nil
	}
	if err := os.MkdirAll(links, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(dir, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// dirs are the directories in which something may be kept: the one that the list names first.
func (p *Plugin) dirs(now string) []string {
	out := []string{now}
	add := func(dir string) {
		if !slices.Contains(out, dir) {
			out = append(out, dir)
		}
	}
	if p.Home != "" {
		add(p.Home)
	}
	links, _ := filepath.Glob(filepath.Join(p.Home, dirLinks, "*"))
	for _, l := range links {
		if dir, err := os.Readlink(l); err == nil && filepath.IsAbs(dir) {
			add(dir)
		}
	}
	return out
}

// flannelKept is what flannel's plugin kept for a container in a directory: one file, by the container's ID. A pod that it
// made is taken down by it after the change to this plugin.
type flannelKept struct{ dir string }

func (f flannelKept) path(a attachment) string { return filepath.Join(f.dir, a.container) }

func (f flannelKept) load(a attachment) ([]byte, error) {
	root, err := os.OpenRoot(f.dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	return root.ReadFile(a.container)
}

func (f flannelKept) remove(a attachment) error {
	root, err := os.OpenRoot(f.dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	return root.Remove(a.container)
}
