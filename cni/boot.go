package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/internal/ownfile"
)

// A reboot ends every pod, and not every runtime says so with DEL or GC. What ADD keeps names the boot in which it
// was; the first ADD of another one takes back all that is older. That a boot is another one is told by its ID, and
// by nothing that a clock says.

// bootKey is where that ID stands in what is kept. It is not passed to a delegate.
const bootKey = "overlayd.io/boot-id"

// bootFile is in the directory of each network: the boot before which nothing there is from. host-local's may be on
// another disk.
const bootFile = ".boot"

func readBootID() string {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // of what is kept then, nothing is taken back but by DEL and GC
	}
	return strings.TrimSpace(string(raw))
}

// keep puts what ADD generated in place, once the attachments of earlier boots are taken back. A container that is
// started again under the ID that it had has to find its old address free, and must not lose the new one: so both are
// done under one lock.
func (p *Plugin) keep(ctx context.Context, j job, d Delegate, path string) error {
	conf, err := edit(d.Conf, map[string]any{bootKey: p.BootID})
	if err != nil {
		return err
	}
	s := j.conf.store()
	if swept, err := s.read(bootFile); p.BootID == "" || err == nil && string(swept) == p.BootID {
		return s.save(j.at.file(), conf)
	}
	unlock, err := lockFile(s.path(bootFile))
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.sweep(ctx, j, d, path); err != nil {
		_, _ = fmt.Fprintf(p.Stderr, "attachments from before the reboot: %s\n", oneLine(err.Error()))
	}
	return s.save(j.at.file(), conf)
}

// sweep takes back what is left of earlier boots. What fails is tried again by the next ADD.
func (p *Plugin) sweep(ctx context.Context, j job, d Delegate, path string) error {
	before, err := j.conf.store().read(bootFile)
	if err != nil || string(before) == p.BootID { // another ADD has done it meanwhile
		return err
	}
	booted, err := bootTime()
	if err != nil {
		return err
	}
	old := func(k kept) bool {
		var of map[string]json.RawMessage
		var id string
		if json.Unmarshal(k.conf, &of) != nil { // as a power failure leaves a file that was written just before
			info, err := os.Stat(k.path())
			return err == nil && info.ModTime().Before(booted)
		}
		return json.Unmarshal(of[bootKey], &id) == nil && id != "" && id != p.BootID
	}
	err = p.removeAll(ctx, j.conf, path, func(_ attachment, k kept) bool { return old(k) })
	// One attachment that can't be removed keeps no other addresses taken.
	if err = errors.Join(err, p.freeAddresses(j.conf, d)); errors.Is(err, errNothingHeld) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(j.conf.store().path(bootFile), []byte(p.BootID), 0o600)
}

// errNothingHeld says that host-local has no directory yet. It makes one in this ADD; the next one marks it.
var errNothingHeld = errors.New("host-local holds nothing")

// freeAddresses frees what host-local holds for attachments of which nothing is kept, as where dataDir does not
// outlive a reboot. What this plugin made in this boot is kept, or is not made yet. But pods may have got addresses
// under the network's name from flannel's plugin, or with another list: the former are known by its files, the latter
// by the time of theirs.
func (p *Plugin) freeAddresses(c Config, d Delegate) error {
	var conf struct {
		IPAM struct{ Type, DataDir string }
	}
	if err := json.Unmarshal(d.Conf, &conf); err != nil || conf.IPAM.Type != "host-local" {
		return err
	}
	if conf.IPAM.DataDir == "" {
		conf.IPAM.DataDir = "/var/lib/cni/networks"
	}
	dir := filepath.Join(conf.IPAM.DataDir, c.Name)
	unlock, err := lockFile(filepath.Join(dir, "lock")) // host-local's own
	if errors.Is(err, fs.ErrNotExist) {
		return errNothingHeld
	}
	if err != nil {
		return err
	}
	defer unlock()
	marker := filepath.Join(dir, bootFile)
	if before, err := ownfile.Read(marker, maxKeptSize); err == nil && len(before) > 0 && string(before) != p.BootID {
		if err := p.freeUnknown(c, dir); err != nil {
			return err
		}
	}
	return os.WriteFile(marker, []byte(p.BootID), 0o600)
}

func (p *Plugin) freeUnknown(c Config, dir string) error {
	booted, err := bootTime()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, dir := range p.dirs(c.DataDir) {
		all, err := store{dir, c.Name}.list()
		if err != nil {
			return err
		}
		for _, at := range all {
			known[at.container] = true
		}
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		info, infoErr := e.Info()
		_, notAddress := netip.ParseAddr(e.Name())
		if notAddress != nil || infoErr != nil || !e.Type().IsRegular() || !info.ModTime().Before(booted) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		raw, readErr := ownfile.Read(path, maxKeptSize)
		if readErr != nil {
			continue
		}
		// Of one that a power failure broke, there is nothing or zeros.
		container, _, _ := strings.Cut(strings.Trim(string(raw), "\x00 \r\n"), "\r\n")
		at, notContainer := newAttachment(container, "eth0") // flannel's plugin has one file for all interfaces
		flannels := func(dir string) bool {
			_, err := flannelKept(dir, at)
			return !errors.Is(err, fs.ErrNotExist)
		}
		if container != "" && (notContainer != nil || known[container] || flannels(c.DataDir) || flannels(p.FlannelDir)) {
			continue
		}
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// bootTime is when the machine was started, by its clock as it goes now.
func bootTime() (time.Time, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}, err
	}
	return time.Now().Add(-time.Duration(up.Nano())), nil
}

// lockFile takes a lock that ends with the process at the latest.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil
}

// removeAll takes back the attachments of a network that a condition holds for, wherever they were kept.
func (p *Plugin) removeAll(ctx context.Context, c Config, path string, which func(attachment, kept) bool) error {
	c.prevResult, c.runtimeConfig = nil, nil // those of one attachment, if any
	var errs []error
	for _, dir := range p.dirs(c.DataDir) {
		s := store{dir, c.Name}
		all, err := s.list()
		if err != nil {
			errs = append(errs, ioError(err))
		}
		for _, at := range all {
			j := job{c, at}
			k, err := s.kept(at.file())
			if err == nil && which(at, k) {
				err = p.removeOne(ctx, j, k, path)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // then a DEL was faster
				errs = append(errs, fmt.Errorf("%s: %w", at.file(), err))
			}
		}
	}
	return joined(errs...)
}

// removeOne is a DEL without the container's namespace, which may be another one's by now.
func (p *Plugin) removeOne(ctx context.Context, j job, k kept, path string) error {
	return p.takeBack(j, k, func(d Delegate) error {
		program, err := p.Exec.FindInPath(d.Type, filepath.SplitList(path))
		if err != nil {
			return err
		}
		env := &invoke.Args{Command: "DEL", ContainerID: j.at.container, IfName: j.at.ifname, Path: path}
		return invoke.ExecPluginWithoutResult(ctx, program, d.Conf, env, p.Exec)
	})
}
