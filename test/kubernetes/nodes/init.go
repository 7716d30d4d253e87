package nodes

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// InitCommand is the argument by which the program that uses this package must call [Init].
const InitCommand = "node-init"

// Init is the first process of a node: it makes the node's file system out of the machine's and then waits for orphans,
// as the first process of a machine does. It returns only where that fails.
func Init(name, dir string) error {
	if err := syscall.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("sethostname: %w", err)
	}
	if err := mounts(name, dir); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "ready"), nil, 0o644); err != nil {
		return err
	}
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for range child {
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

// mounts gives the node an own /etc, /opt and /var, which start as the machine's, an empty /run, and a /sys that shows
// the node's devices. Nothing is written to the machine's own directories.
func mounts(name, dir string) error {
	m := &mounter{}
	m.mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, "")
	for _, top := range []string{"/etc", "/opt", "/var"} {
		upper, work := filepath.Join(dir, "upper", top), filepath.Join(dir, "work", top)
		m.mkdir(upper, work)
		m.mount("overlay", top, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", top, upper, work))
	}
	// Containers' own overlays can't lie on an overlay; and the kubelet measures these.
	for _, path := range []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/log/pods"} {
		m.mkdir(filepath.Join(dir, "data", path), path)
		m.mount(filepath.Join(dir, "data", path), path, "", syscall.MS_BIND, "")
	}
	m.write("/etc/machine-id", fmt.Sprintf("%032x\n", name))
	m.write("/etc/hostname", name+"\n")
	m.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
	m.mkdir("/run/netns", "/run/lock", "/run/cgroup")
	m.mount("/sys/fs/cgroup", "/run/cgroup", "", syscall.MS_BIND|syscall.MS_REC, "")
	m.mount("sysfs", "/sys", "sysfs", 0, "")
	m.mount("/run/cgroup", "/sys/fs/cgroup", "", syscall.MS_BIND|syscall.MS_REC, "")
	if m.err == nil {
		m.err = syscall.Unmount("/run/cgroup", syscall.MNT_DETACH)
	}
	m.mount("", "/", "", syscall.MS_SHARED|syscall.MS_REC, "")
	return m.err
}

// mounter does one thing after the other until one fails.
type mounter struct{ err error }

func (m *mounter) mount(source, target, kind string, flags uintptr, data string) {
	if m.err != nil {
		return
	}
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		m.err = fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
}

func (m *mounter) mkdir(paths ...string) {
	for _, p := range paths {
		m.err = errors.Join(m.err, os.MkdirAll(p, 0o755))
	}
}

func (m *mounter) write(path, content string) {
	if m.err != nil {
		return
	}
	_ = os.Remove(path) // what it was on the machine may be read-only, or a link
	m.err = os.WriteFile(path, []byte(content), 0o644)
}
