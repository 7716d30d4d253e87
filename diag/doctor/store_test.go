package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlayd/overlayd/diag/status"
)

// What others can read of the secrets that are in use is named, and nothing else.
func TestExposedSecrets(t *testing.T) {
	t.Parallel()
	open, closed := filepath.Join(t.TempDir(), "open"), filepath.Join(t.TempDir(), "closed")
	for file, mode := range map[string]os.FileMode{open: 0o644, closed: 0o600} {
		if err := os.WriteFile(file, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	etcd, kube := Store{Kind: status.Etcd}, Store{Kind: status.Kubernetes}
	etcd.Etcd.KeyFile, etcd.Etcd.PasswordFile, etcd.Kube.Kubeconfig = open, closed, open
	etcd.Etcd.Username = "u"
	etcd.Etcd.Endpoints = []string{"http://127.0.0.1:2379", "http://[::1]:2379", "http://localhost:2379", "https://a:2379"}
	kube.Etcd, kube.Kube.Kubeconfig = etcd.Etcd, open
	plain := etcd
	plain.Etcd.KeyFile, plain.Etcd.Endpoints = "", []string{"http://192.0.2.1:2379", "http://etcd:2379"}
	anonymous := plain
	anonymous.Etcd.Username = ""
	for _, x := range []struct {
		what string
		s    Store
		want []string
	}{
		{"etcd", etcd, []string{"--etcd-keyfile " + open}},
		{"kubernetes", kube, []string{"--kubeconfig " + open}},
		{"plain text", plain, []string{"http://192.0.2.1:2379 gets the password", "http://etcd:2379 gets the password"}},
		{"no password", anonymous, nil},
	} {
		got := x.s.Exposed()
		if len(got) != len(x.want) {
			t.Errorf("%s: %v", x.what, got)
			continue
		}
		for i, want := range x.want {
			if !strings.HasPrefix(got[i].Text, want) {
				t.Errorf("%s: %q, want %q", x.what, got[i].Text, want)
			}
		}
	}
}
