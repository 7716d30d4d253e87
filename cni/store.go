package cni

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/overlayd/overlayd/internal/ownfile"
)

// store is a directory DIR/NETWORK of files. Access goes through os.Root, so that no name, and no symbolic link, leads
// out of it.
type store struct {
	dir, network string
}

// attachment is one interface of one container. Its parts were checked: neither can hold a slash or a colon, and a
// container's ID begins with a letter or a digit.
type attachment struct {
	container, ifname string
}

const maxKeptSize = 1 << 20 // of a delegate's configuration, in bytes: a list that operators write has some kB

const maxContainerID = 200 // leaves room for the interface in a file name of at most 255 bytes

func newAttachment(container, ifname string) (attachment, error) {
	clip := func(s string) string { return s[:min(len(s), maxContainerID)] }
	if err := utils.ValidateContainerID(container); err != nil || len(container) > maxContainerID {
		return attachment{}, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_CONTAINERID: expected "+
			"at most %d letters, digits, dots, dashes and underscores, found %q", maxContainerID, clip(container)), "")
	}
	if err := utils.ValidateInterfaceName(ifname); err != nil || strings.ContainsRune(ifname, 0) {
		return attachment{}, types.NewError(types.ErrInvalidEnvironmentVariables,
			fmt.Sprintf("CNI_IFNAME: expected the name of a network device, found %q", clip(ifname)), "")
	}
	return attachment{container: container, ifname: ifname}, nil
}

func (a attachment) file() string { return a.container + ":" + a.ifname }

func (s store) path(file string) string { return filepath.Join(s.dir, s.network, file) }

// makeDir makes the directory of a network, where that may be: the path is the configuration's to choose, and whoever
// may write a configuration, such as one for Multus, is not to create directories all over the node. That is below home,
// where the plugin's own are, or in a directory that an operator made for it: root's alone, with nothing but directories.
func (s store) makeDir(home string) error {
	refused := func(cause string) error {
		return fmt.Errorf("dataDir: %s: %s; expected a path below %s, or an empty directory of root's with mode 0700",
			s.dir, cause, home)
	}
	if strings.HasPrefix(filepath.Clean(s.dir), filepath.Clean(home)+"/") {
		return os.MkdirAll(s.path(""), 0o700)
	}
	info, err := os.Lstat(s.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return refused("does not exist")
	case err != nil:
		return err
	case !info.IsDir():
		return refused("not a directory")
	}
	if uid, foreign := ownfile.Owner(info); foreign {
		return refused(fmt.Sprintf("belongs to user %d", uid))
	}
	if info.Mode().Perm()&0o077 != 0 {
		return refused(fmt.Sprintf("open to others (mode %#o)", info.Mode().Perm()))
	}
	if _, err := os.Lstat(s.path("")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries { // those of other networks
		if !e.IsDir() {
			return refused("holds other files")
		}
	}
	return os.Mkdir(s.path(""), 0o700)
}

// save puts a file in place in one step. It is not flushed to the disk, which would take longer than all the rest of
// ADD: what a power failure breaks is recreated where it is needed.
func (s store) save(file string, content []byte) error {
	root, err := s.open()
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	tmp := "." + rand.Text() // no container's ID begins with a dot
	if err = root.WriteFile(tmp, content, 0o600); err == nil {
		err = root.Rename(tmp, file)
	}
	if err != nil {
		_ = root.Remove(tmp)
	}
	return err
}

func (s store) open() (*os.Root, error) {
	top, err := os.OpenRoot(s.dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = top.Close() }()
	return top.OpenRoot(s.network)
}

// read returns the content of a file; fs.ErrNotExist says that there is none.
func (s store) read(file string) ([]byte, error) {
	root, err := s.open()
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	content, err := ownfile.ReadIn(root, file, maxKeptSize)
	if refused := (*ownfile.Error)(nil); errors.As(err, &refused) {
		refused.Path = s.path(file)
	}
	return content, err
}

// remove removes a file; that there is none is fine.
func (s store) remove(file string) error {
	root, err := s.open()
	if err == nil {
		err = root.Remove(file)
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
	link := filepath.Join(p.Home, dirLinks, fmt.Sprintf("%x", sha256.Sum256([]byte(dir))))
	if to, err := os.Readlink(link); err == nil && to == dir {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
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

// kept is what was kept of an attachment at ADD, and where.
type kept struct {
	store
	file string
	conf []byte
}

func (k kept) path() string { return k.store.path(k.file) }

func (k kept) forget() error { return k.remove(k.file) }

func (s store) kept(file string) (kept, error) {
	conf, err := s.read(file)
	return kept{s, file, conf}, err
}

// flannelKept is what flannel's plugin kept for a container, by whose ID the file is named, whatever the network. A pod
// that it made is taken down by it after the change to this plugin.
func flannelKept(dir string, at attachment) (kept, error) { return store{dir, "."}.kept(at.container) }
