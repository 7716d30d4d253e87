package nodes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupTop is the cgroup of everything that this package starts.
const cgroupTop = "overlayd-kubernetes"

// hierarchies are the cgroup trees of this machine: one with cgroup v2; with v1 one for each controller, and "unified"
// without any, in which runc makes cgroups, too.
func hierarchies() ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		return []string{cgroupRoot}, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() { // links are second names
			out = append(out, filepath.Join(cgroupRoot, e.Name()))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no cgroups are mounted", cgroupRoot)
	}
	return out, nil
}

// makeCgroup makes a cgroup below ours, in every hierarchy.
func makeCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		path := h
		for _, part := range strings.Split(filepath.Join(cgroupTop, name), "/") {
			if err := passControllers(path); err != nil {
				return err
			}
			parent := path
			path = filepath.Join(path, part)
			if err := os.MkdirAll(path, 0o755); err != nil {
				return err
			}
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // in v1 a new cpuset has none, and takes no process
				if err := inherit(parent, path, f); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// passControllers lets a cgroup's children have its controllers: needed in v2 only.
func passControllers(path string) error {
	raw, err := os.ReadFile(filepath.Join(path, "cgroup.controllers"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(raw)) {
		if err := os.WriteFile(filepath.Join(path, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return err
		}
	}
	return nil
}

func inherit(parent, path, file string) error {
	if _, err := os.Stat(filepath.Join(path, "cgroup.controllers")); err == nil {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join(parent, file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(path, file), raw, 0)
}

// joinCgroup moves a process into a cgroup below ours.
func joinCgroup(name string, pid int) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := os.WriteFile(filepath.Join(h, cgroupTop, name, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("join the cgroup %s: %w", name, err)
		}
	}
	return nil
}

// cgroupsBelow lists the cgroups below one of ours, with it, in every hierarchy, children first.
func cgroupsBelow(name string) ([]string, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, h := range all {
		err := filepath.WalkDir(filepath.Join(h, cgroupTop, name), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				out = append(out, path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Reverse(out)
	return out, nil
}

// pidsIn are the processes in those cgroups below one of ours whose path contains a text; with "", all.
func pidsIn(name, contains string) ([]int, error) {
	paths, err := cgroupsBelow(name)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, p := range paths {
		if !strings.Contains(p, contains) {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, field := range strings.Fields(string(raw)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				out = append(out, pid)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// clearCgroup kills every process in a cgroup of ours and removes it.
func clearCgroup(name string) error {
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		pids, err := pidsIn(name, "")
		if err != nil {
			return err
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(pids) == 0 {
			if err = removeCgroup(name); err == nil {
				return nil
			}
		}
		if time.Now().After(end) {
			return fmt.Errorf("the cgroup %s does not go away: processes %v, %w", name, pids, err)
		}
	}
}

func removeCgroup(name string) error {
	paths, err := cgroupsBelow(name)
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := syscall.Rmdir(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}
